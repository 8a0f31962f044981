"""Rules that the code keeps everywhere."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "stepgguf"

# package -> the packages of ours that it may import (itself and errors always)
MAY_IMPORT = {
    "errors": set(),
    "files": set(),
    "model": {"files"},
    "quants": {"files", "model"},
    "convert": {"files", "model", "quants"},
    "reference": {"files", "model", "quants", "convert"},
    "calibration": {"files", "model", "quants", "convert", "reference", "chat.template", "chat.messages"},
    "evaluation": {"files", "model", "quants", "convert", "reference", "calibration", "runtime.llama"},
    "runtime": {"files", "model.hparams"},
    "fit": {"files", "model", "quants", "convert", "runtime.engine", "runtime.llama_build", "runtime.placement"},
    "setup": {"files", "fit", "runtime.llama_build"},
    "grammar": set(),
    "chat": {"files", "grammar", "runtime.engine"},
    "conversation": {"files", "chat", "runtime.engine", "runtime.http_events"},
    "agents": {"files", "runtime.http_events"},
    "server": {"chat", "runtime.engine"},
    "demo": {"calibration.tokenizer", "chat.template", "convert.sources", "model", "reference"},
    "report": {"files", "model", "convert", "quants", "fit", "runtime.engine"},
    "cli": {
        "files",
        "model",
        "quants",
        "convert",
        "reference",
        "calibration",
        "evaluation",
        "fit",
        "report",
        "runtime",
        "grammar",
        "chat",
        "conversation",
        "agents",
        "server",
        "demo",
        "setup",
    },
}
# foreign module -> the only files that may import it
ONLY_IN = {
    "ctypes": ("quants/ggml.py", "runtime/llama/", "runtime/llama_build.py"),
    "llama_cpp": ("runtime/llama/", "runtime/llama_build.py"),
    "numba": ("quants/lanes/",),
    "llvmlite": ("quants/lanes/",),
    "torch": ("reference/", "calibration/", "evaluation/stream_logits.py", "demo/train.py"),
    "safetensors": ("demo/train.py",),
    "tokenizers": ("calibration/tokenizer.py", "demo/"),
    "jinja2": ("chat/renderer.py",),
    "fastapi": ("server/",),
    "starlette": ("server/",),
    "pydantic": ("server/",),
    "uvicorn": ("server/",),
    "prometheus_client": ("server/metrics.py",),
    "prompt_toolkit": ("cli/",),
    "huggingface_hub": ("convert/sources/hub_repository.py", "convert/sources/remote_file.py"),
    "httpx2": ("convert/sources/hub_repository.py", "convert/sources/remote_file.py"),
    "typer": ("cli/",),
    "rich": ("cli/",),
    "gguf": ("files/gguf_header.py", "quants/", "convert/", "calibration/"),
    "platformdirs": ("files/folders.py",),
    "yaml": ("convert/card.py", "report/card_text.py"),
}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_what_its_package_may(path: Path) -> None:
    relative = path.relative_to(PACKAGE)
    if len(relative.parts) == 1 and relative.stem != "errors":
        return  # __init__ and __main__
    package = relative.parts[0].removesuffix(".py")
    allowed = MAY_IMPORT[package] | {package, "errors"}
    for name in imports(path):
        root, _, rest = name.partition(".")
        if root == "stepgguf" and rest and rest != "__version__":
            assert any(rest == a or rest.startswith(a + ".") for a in allowed), f"{relative} imports {name}"
        for foreign, places in ONLY_IN.items():
            if root == foreign:
                assert str(relative).startswith(places), f"{relative} imports {name}"


# what is imported under another name than it is installed by
INSTALLED_AS = {
    "huggingface_hub": "huggingface_hub",
    "llama_cpp": "llama-cpp-python",
    "markdown_it": "markdown-it-py",
    "yaml": "pyyaml",
}


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib")
def test_what_is_imported_is_declared() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    declared = {
        re.split(r"[^\w.-]", line)[0]
        for line in [*project["dependencies"], *extras["run"], *extras["hub"], *extras["reference"]]
    }
    imported = {name.partition(".")[0] for path in modules() for name in imports(path)}
    foreign = imported - sys.stdlib_module_names - {"stepgguf", "pydantic_core"}  # pydantic's own other half
    assert {INSTALLED_AS.get(name, name.replace("_", "-")) for name in foreign} <= declared


@pytest.mark.slow
def test_no_imports_run_in_a_circle() -> None:
    """At module level: inside a function an import may go where it likes, as far as the table above lets it."""
    paths = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in modules()
    }
    graph: dict[str, set[str]] = {}
    for name, path in paths.items():
        lines = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ImportFrom) and node.module]
        named = {f"{node.module}.{alias.name}" for node in lines for alias in node.names}
        graph[name] = {module if module in paths else module.rpartition(".")[0] for module in named} & paths.keys()
    TopologicalSorter(graph).prepare()  # CycleError names the circle


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom stepgguf.cli.main import main\nmain(['--help'])\n"
        "heavy = {'numpy', 'torch', 'numba', 'llama_cpp', 'gguf', 'jinja2', 'fastapi', 'prompt_toolkit', 'packaging'}\n"
        "heavy &= set(sys.modules)\n"
        "sys.exit(f'loaded: {heavy}' if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_no_file_is_a_drawer() -> None:
    assert not [path for path in modules() if re.search(r"util|helper|common|misc", path.stem)]


def test_no_file_is_longer_than_500_lines() -> None:
    assert not [path for path in modules() if len(path.read_text().splitlines()) > 500]


def test_the_map_has_every_package() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    for folder in sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py")):
        assert re.search(rf"^\s*{folder}/", page, re.MULTILINE), f"the map lacks {folder}/"


def test_the_changelog_has_this_version() -> None:
    from stepgguf import __version__

    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text()
