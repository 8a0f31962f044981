"""How this package was installed, so that hints name a command that works here.

The package is on no index under its name: what pip installed it from (direct_url.json, PEP 610) is what it is installed
from again with an extra. Where that is gone, the extra's own packages are named.
"""

from __future__ import annotations

import importlib.util
import json
import shlex
import shutil
import sys
from importlib import metadata
from pathlib import Path
from urllib.parse import unquote, urlparse

NAME = "stepgguf"
_CHECKOUT = Path(__file__).parents[2]


def install_command() -> tuple[str, ...]:
    """The start of the command line with which pip installs for this interpreter, or uv where there is no pip."""
    if importlib.util.find_spec("pip") is None:
        return ("uv", "pip", "install", "--python", sys.executable)
    return (sys.executable, "-m", "pip", "install")


def extra_command(extra: str, distribution: metadata.Distribution | None = None) -> str:
    """The command line that adds an extra to the package as it is installed here."""
    found = distribution or _distribution()
    return f"{shlex.join(map(_short_name, install_command()))} {_requirement_with(extra, found)}"


def _short_name(word: str) -> str:
    """The word, but this interpreter is called python where that is the one on the PATH."""
    here = shutil.which("python")
    return "python" if word == sys.executable and here and Path(here).parent == Path(word).parent else word


def _distribution() -> metadata.Distribution | None:
    try:
        return metadata.distribution(NAME)
    except metadata.PackageNotFoundError:
        return None


def _requirement_with(extra: str, found: metadata.Distribution | None) -> str:
    """What pip is to install: the package with an extra, from where it came from, or else the extra's own packages."""
    origin = json.loads((found and found.read_text("direct_url.json")) or "{}")
    url = str(origin.get("url", ""))
    path = Path(unquote(urlparse(url).path))
    if url.startswith("file:") and path.exists():
        editable = "-e " if origin.get("dir_info", {}).get("editable") else ""
        return f"{editable}'{path}[{extra}]'"
    if url and not url.startswith("file:"):
        vcs = origin.get("vcs_info", {}).get("vcs")
        return f"'{NAME}[{extra}] @ {f'{vcs}+' if vcs else ''}{url}'"
    if (_CHECKOUT / "pyproject.toml").exists():
        return f"-e '{_CHECKOUT}[{extra}]'"
    needed = [text.partition(";") for text in (found.requires if found else None) or []]
    return " ".join(
        f"'{name.strip()}'" for name, _, marker in needed if marker.replace('"', "'").endswith(f"'{extra}'")
    )
