"""What running a model needs, by this package's own metadata, and what of it is not installed here.

The metadata is that of the installed package, so a wheel is enough and no checkout is needed.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from importlib import metadata

from packaging.requirements import Requirement

from stepgguf.errors import SetupError
from stepgguf.files import installed

ENGINE = "llama-cpp-python"
_EXTRA = "run"


def run_requirements() -> tuple[Requirement, ...]:
    """What the extra for running models asks for on this Python, the engine included."""
    try:
        texts = metadata.requires(installed.NAME) or []
    except metadata.PackageNotFoundError as error:
        raise SetupError(
            "stepgguf runs from a folder and is not installed, so what it needs is not known",
            hint="Install it first: python -m pip install FOLDER",
        ) from error
    return tuple(r for r in map(Requirement, texts) if _holds(r, _EXTRA) and not _holds(r, ""))


def engine_requirement(requirements: Iterable[Requirement]) -> Requirement:
    """The engine's own among them."""
    return next(requirement for requirement in requirements if requirement.name == ENGINE)


def are_met(requirements: Iterable[Requirement]) -> bool:
    """Whether all of them are installed, and what the installed engine asks for."""
    importlib.invalidate_caches()  # they may have been installed since this process began
    asked = [*requirements]
    for name in (r.name for r in requirements if r.name == ENGINE and _is_met(r)):
        asked += (r for r in map(Requirement, metadata.requires(name) or []) if _holds(r, ""))
    return all(map(_is_met, asked))


def _is_met(requirement: Requirement) -> bool:
    try:
        return requirement.specifier.contains(metadata.version(requirement.name), prereleases=True)
    except metadata.PackageNotFoundError:
        return False


def _holds(requirement: Requirement, extra: str) -> bool:
    """Whether it is asked for on this Python and system with an extra; "" is none."""
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})
