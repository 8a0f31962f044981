"""Every command that README and docs/ show is typed, page by page, with the embedded model in the real one's place.

What a page's commands start from lies there already: a checkpoint Step-3.5-Flash/, step.gguf, imatrix.gguf and what
else the pages name. hf: is a Hub on the loopback. SHORTER adds what makes a command short; commands of other programs
are not run, but must be known.
"""

from __future__ import annotations

import io
import itertools
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from stepgguf.cli.main import main
from stepgguf.demo import CHECKPOINT
from stepgguf.files import folders
from tests.cli.test_launch import write_stubs
from tests.conftest import INTERRUPTIBLE
from tests.convert.hub_server import Hub, serving, set_endpoint
from tests.docs.pages import PAGES, ROOT, Block, all_blocks, blocks, commands

pytestmark = pytest.mark.slow

CHAT = '{"messages": [{"role": "user", "content": "What is 2 + 3?"}, {"role": "assistant", "content": "2 + 3 = 5"}]}\n'
SENTENCES = ROOT / "stepgguf" / "calibration" / "texts" / "mathematics.txt"
SHORTER = {
    "imatrix": ["--chunks", "1"],
    "eval": ["--text", str(SENTENCES), "--ctx", "128", "--chunks", "2"],
    "bench": ["--depths", "0", "--batches", "1", "-n", "8", "-r", "1"],
    "serve": ["--port", "0", "--threads", "1"],
    "launch": ["--threads", "1"],
    "setup": ["--dry-run"],
    "--calibrate": ["--dry-run"],
}
REPLACED = {"131072": "4096"}  # the embedded model's longest context
# Programs that are not ours: they need a network, another system or root. `make` is what runs these tests.
OTHERS = {"git", "cd", "make", "python3", ".", "pip", "pipx", "uv", "hf", "npm", "sudo", "docker", "curl"}


@pytest.fixture(scope="module")
def pantry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages' commands start from."""
    folder = tmp_path_factory.mktemp("docs")
    source = folder / "Step-3.5-Flash"
    shutil.copytree(CHECKPOINT, source)
    shutil.copy(SENTENCES, folder / "notes.txt")
    (folder / "chats.jsonl").write_text(CHAT * 8)
    (folder / "mine.toml").write_text(next(blocks(ROOT / "docs" / "types.md", "toml")).text)
    for command in (
        "convert {0}/Step-3.5-Flash {0}/step.gguf -t Q4_K_S",
        "convert {0}/Step-3.5-Flash {0}/stock-q4_k_s.gguf -t Q4_K_S",
        "convert {0}/Step-3.5-Flash {0}/step-bf16.gguf -t BF16",
        "imatrix {0}/Step-3.5-Flash -o {0}/imatrix.gguf",
        "eval {0}/step.gguf --against {0}/Step-3.5-Flash --base {0}/step.base -o {0}/step.json",
    ):
        words = command.format(folder).split()
        assert main([*words, *SHORTER.get(words[0], []), "-q"]) == 0
    shutil.copy(folder / "step.json", folder / "stock.json")
    return folder


@pytest.fixture(scope="module")
def hub(pantry: Path) -> Iterator[Hub]:
    with serving(Hub(pantry / "Step-3.5-Flash")) as hub:
        yield hub


@pytest.fixture
def desk(pantry: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with all of it, in which commands are typed."""
    folder = tmp_path / "desk"
    shutil.copytree(pantry, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folders.cache().parent))  # compiled kernels are the machine's
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    set_endpoint(monkeypatch, hub.url)
    write_stubs(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return folder


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_of_a_page_run(
    page: Path, desk: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for block in blocks(page, "sh"):
        if block.needs is None:
            for words in commands(block):
                type_command(words, desk, monkeypatch, capfd)


def type_command(
    words: list[str], desk: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    while "=" in words[0]:  # VARIABLE=value before the command
        monkeypatch.setenv(*words.pop(0).split("=", 1))
    program, *arguments = (os.path.expanduser(REPLACED.get(word, word)) for word in words)
    if program != "stepgguf":
        assert program in OTHERS, f"a program that is not known: {' '.join(words)}"
        return
    for word in tuple(arguments):
        if "--dry-run" not in arguments:
            arguments[1:1] = SHORTER.get(word, [])
    make_room(arguments, desk)
    monkeypatch.setattr("sys.stdin", io.StringIO("What is 347 + 286?\n"))
    shown = " ".join(words)
    if arguments[0] == "serve":
        assert serves(arguments), shown
    else:
        assert main(arguments) == 0, f"{shown}\n{capfd.readouterr().err}"


def make_room(arguments: list[str], desk: Path) -> None:
    """Remove what a command would refuse to replace: pages show how a file is made that others begin with."""
    made = [arguments[2]] if arguments[0] in ("convert", "quantize") and "--dry-run" not in arguments else []
    options = ("-o", "--output", "--base")
    made += [value for option, value in itertools.pairwise(arguments) if option in options]
    for name in made:
        for path in desk.glob(f"{name}*"):
            path.unlink()


def serves(arguments: list[str]) -> bool:
    """Whether it answers at the address that it announces, and ends when it is asked to."""
    with subprocess.Popen([*INTERRUPTIBLE, *arguments], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        addresses = (re.search(r"http://[\w.]+:\d+", line) for line in process.stderr)
        address = next((found[0] for found in addresses if found), None)
        key = {"authorization": f"Bearer {os.environ.get('STEPGGUF_API_KEY')}"}
        with httpx.Client(transport=httpx.HTTPTransport(retries=20)) as client:  # it listens in a moment
            healthy = address is not None and client.get(f"{address}/health", headers=key).is_success
        process.send_signal(signal.SIGINT)
        process.stderr.read()
    return healthy and process.returncode in (0, 130)


NOT_RUN = [block for block in all_blocks("sh") if block.needs is not None]


@pytest.mark.parametrize("block", NOT_RUN, ids=lambda block: block.name)
def test_what_is_not_run_says_what_it_needs(block: Block) -> None:
    assert block.needs is not None
    assert len(block.needs.split()) > 1


def test_every_shell_block_is_marked_as_one() -> None:
    """So that no command escapes these tests."""
    for block in all_blocks("", "text", "bash", "shell", "console"):
        assert not any(line.startswith(("stepgguf ", "$ ")) for line in block.text.splitlines()), block.name
