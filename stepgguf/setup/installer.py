"""The command lines that install into this environment: of pip, or of uv where there is no pip.

A virtual environment and pipx's have pip; what `uv tool install` and `uv venv` make have none.
"""

from __future__ import annotations

import shutil
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement

from stepgguf.errors import SetupError
from stepgguf.files import installed
from stepgguf.setup.requirements import ENGINE

# Neither a wheel that is kept nor one that an index or a folder offers is taken: none says what it was built for.
_BUILD_WITH_PIP = ("--verbose", "--no-cache-dir", "--force-reinstall", "--no-deps", "--no-binary", ENGINE)
_BUILD_WITH_UV = ("--verbose", "--no-cache", "--reinstall", "--no-deps", "--no-binary", ENGINE)


def check_installer() -> None:
    """SetupError where nothing can, or may, be installed into this environment."""
    if sys.prefix == sys.base_prefix and Path(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED").exists():
        raise SetupError(
            f"{sys.executable} belongs to the system, which installs nothing into it that is not its own package",
            hint="Install stepgguf into an environment of its own (python3 -m venv, pipx or uv tool install), and run "
            "its `stepgguf setup`.",
        )
    tool = installed.install_command()[0]
    if shutil.which(tool) is None:
        raise SetupError(
            f"the environment of {sys.executable} has no pip, and there is no uv on the PATH to install into it",
            hint=f"Put uv on the PATH, or get pip: {sys.executable} -m ensurepip",
        )


def build_command(engine: Requirement) -> tuple[str, ...]:
    """Build the engine from its source and put it in the place of what is installed, its requirements apart."""
    command = installed.install_command()
    options = _BUILD_WITH_UV if command[0] == "uv" else _BUILD_WITH_PIP
    return (*command, *options, _specified(engine))


def install_command(requirements: Iterable[Requirement]) -> tuple[str, ...]:
    """Install what is missing of these, and of what they ask for; what is installed and suffices stays."""
    return (*installed.install_command(), *map(_specified, requirements))


def _specified(requirement: Requirement) -> str:
    """As pip takes it, without the marker, which has been looked at."""
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    return f"{requirement.name}{extras}{requirement.specifier}"
