"""stepgguf list: what lies on this disk, and how much of it it takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stepgguf.cli import arguments
from stepgguf.files.byte_sizes import readable_size

if TYPE_CHECKING:
    from stepgguf.convert.local_models import LocalModel

Folders = Annotated[  # here `list` is still Python's
    list[Path] | None,
    typer.Argument(metavar="FOLDER...", help="Where to look; not in their folders. Default: the current folder."),
]


def list(folders: Folders = None, json: arguments.Json = False) -> None:
    """List the GGUF files of a folder, with size, type and state, and what sessions and caches take.

    A file that is unfinished is gone on with by the command that began it. `stepgguf rm` removes one with all that
    belongs to it. What stepgguf did not make is listed as such.

    Examples:

    - `stepgguf list`
    - `stepgguf list models/ /data/gguf`
    - `stepgguf list --json`
    """
    from stepgguf.cli import output
    from stepgguf.convert.local_models import find_models
    from stepgguf.errors import OutputError

    places = folders or [Path()]
    for folder in places:
        if not folder.is_dir():
            raise OutputError(f"{folder} is not a folder", hint="Give the folders in which GGUF files lie.")
    models = {folder: find_models(folder) for folder in places}
    if json:
        reports = [_model_report(model) for some in models.values() for model in some]
        output.print_json({"models": reports, "folders": [*_own_folders()]})
        return
    for folder, some in models.items():
        output.print_lines([f"{folder.resolve()}:", *_model_table(some), ""])
    output.print_lines(_folder_lines())


def _model_table(models: Sequence[LocalModel]) -> Iterator[str]:
    """A line for each model: name, size, type, state."""
    if not models:
        yield "  no GGUF files"
    rows = [
        (_shown(m.path.name), readable_size(m.n_bytes) if m.files else "-", _shown(m.type or "-"), _state_of(m))
        for m in models
    ]
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(3)]
    for name, size, type_name, state in rows:
        yield f"  {name:<{widths[0]}}  {size:>{widths[1]}}  {type_name:<{widths[2]}}  {state}"


def _state_of(model: LocalModel) -> str:
    """What there is of a model, in words."""
    parts = []
    if model.files:
        whole = "whole" if len(model.files) == 1 else f"whole, in {len(model.files)} parts"
        parts.append(whole if model.problem is None else f"damaged: {_shown(model.problem)}")
    if model.run is not None:
        parts.append(f"{'a new one is ' if model.files else ''}unfinished, {model.run.share:.0%} done")
    if model.calibration is not None:
        parts.append("calibration working files")
    if model.working_bytes:
        parts.append(f"{readable_size(model.working_bytes)} in work")
    if model.is_in_use:
        parts.append("in use now")
    if not model.is_ours:
        parts.append("not made by stepgguf")
    return "; ".join(parts)


def _model_report(model: LocalModel) -> dict[str, Any]:
    return {
        "path": str(model.path),
        "files": [str(file) for file in model.files],
        "bytes": model.n_bytes,
        "type": model.type,
        "whole": bool(model.files) and model.problem is None,
        "problem": model.problem,
        "unfinished": model.run and {"share": round(model.run.share, 4), "type": model.run.type},
        "calibration": model.calibration and str(model.calibration),
        "working_bytes": model.working_bytes,
        "in_use": model.is_in_use,
        "made_by_stepgguf": model.is_ours,
    }


def _own_folders() -> Iterator[dict[str, Any]]:
    """What lies in the program's own folders."""
    from stepgguf.files import disk, folders

    for name, path in (
        ("sessions", folders.sessions()),
        ("agents", folders.agents()),
        ("kernels", folders.kernels()),
        ("measured errors", folders.measurements()),
    ):
        n_files = sum(file.is_file() for file in path.rglob("*"))
        yield {"name": name, "path": str(path), "files": n_files, "bytes": disk.used_bytes(path)}


def _folder_lines() -> Iterator[str]:
    from stepgguf.cli.output import counted

    yield "kept by stepgguf:"
    for folder in _own_folders():
        size = readable_size(folder["bytes"])
        yield f"  {folder['name']:<15}  {counted(folder['files'], 'file'):>9}  {size:>9}  {folder['path']}"


def _shown(text: str) -> str:
    """The text without what a terminal would take for a command."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
