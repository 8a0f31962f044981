"""stepgguf rm: remove a GGUF with all that belongs to it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stepgguf.cli import arguments
from stepgguf.files.byte_sizes import readable_size

if TYPE_CHECKING:
    from stepgguf.convert.local_models import LocalModel


def rm(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="NAME|PATH...",
            help="What `stepgguf list` shows, with its folder if that is another one; the ending may be left out.",
        ),
    ],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    quiet: arguments.Quiet = False,
) -> None:
    """Remove GGUF files with all that belongs to them: parts, manifests, and what an unfinished conversion has left.

    It asks first. A GGUF that stepgguf did not make must be named exactly as it is; folders and files that are no GGUF
    are left alone, and so is what another stepgguf is working on.

    Examples:

    - `stepgguf rm step-q4_k_s`
    - `stepgguf rm models/step-00001-of-00003.gguf --yes`
    """
    from contextlib import ExitStack

    from stepgguf.cli import output
    from stepgguf.convert.local_models import belongings, find_model, holding

    models = [*{model.path: model for model in map(find_model, paths)}.values()]
    files = [path for model in models for path in belongings(model)]
    size = readable_size(sum(model.n_bytes + model.working_bytes for model in models))
    folders = [model.calibration for model in models if model.calibration is not None]
    what = " and ".join(
        output.counted(len(some), noun) for some, noun in ((files, "file"), (folders, "folder")) if some
    )
    with ExitStack() as held:
        for model in models:
            held.enter_context(holding(model))
        if not yes:
            for path in (*files, *folders):
                output.note(f"  {path}")
            if not _confirm(f"Remove {what}, {size}?"):
                output.note("nothing is removed; --yes removes without asking")
                raise typer.Exit(1)
        for model in models:
            _remove(model)
    if not quiet:
        output.note(f"removed {what}, {size}")


def _confirm(question: str) -> bool:
    sys.stderr.write(f"{question} [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _remove(model: LocalModel) -> None:
    """Remove a model that is held."""
    from stepgguf.calibration.work_folder import work_folder
    from stepgguf.convert.local_models import belongings
    from stepgguf.files import disk

    with disk.disk_errors(model.path):
        if model.calibration is not None:
            with work_folder(model.calibration, 0):  # which empties it and removes it
                pass
        for path in belongings(model):
            path.unlink()
        disk.sync_folder(model.path.parent)
