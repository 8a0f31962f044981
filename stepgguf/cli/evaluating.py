"""The steps of an evaluation: columns from texts, what the original says of them into a file, and what another says.

    texts --(tokenizer of FILE)--> columns --(original)--> reference file --(FILE)--> figures

The original runs first and alone, since two models may not fit in memory at once.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepgguf.cli import output
from stepgguf.cli.logit_sources import Place, RunOptions, open_file, open_original
from stepgguf.errors import DoesNotFit, OutputError
from stepgguf.files.byte_sizes import readable_size

if TYPE_CHECKING:
    from stepgguf.calibration.source_tokenizer import SourceTokenizer
    from stepgguf.evaluation.columns import Column
    from stepgguf.evaluation.reference_file import KeptColumn

CONTEXTS = (512, 2048)
Choose = Callable[["Sequence[KeptColumn]"], "list[KeptColumn]"]


def require_free(target: Path, overwrite: bool) -> None:
    """Raise OutputError before anything runs if a file cannot be written later."""
    if target.exists() and not overwrite:
        raise OutputError(f"{target} exists", hint="Choose another name, or replace it with --overwrite.")
    if not target.parent.is_dir():
        raise OutputError(f"{target.parent}: no such folder", hint="Choose another folder, or make this one.")


def read_tokenizer(path: Path) -> SourceTokenizer:
    """The tokenizer of the evaluated file, which must be a GGUF of the architecture."""
    from stepgguf.calibration.source_tokenizer import SourceTokenizer
    from stepgguf.convert.sources.gguf_file import GGUFSource

    with GGUFSource(path) as source:
        return SourceTokenizer(source)


def read_columns(
    tokenizer: SourceTokenizer, texts: Sequence[Path] | None, contexts: Sequence[int] | None, chunks: int | None
) -> tuple[Column, ...]:
    """What to evaluate. texts None: those that come with the package."""
    from stepgguf.evaluation.texts import default_texts, make_columns

    return make_columns(tokenizer, texts or default_texts(), contexts or CONTEXTS, chunks)


def chooser(
    tokenizer: SourceTokenizer, texts: Sequence[Path] | None, contexts: Sequence[int] | None, chunks: int | None
) -> Choose:
    """What chooses among the columns of a BASE by the options that were given."""
    from stepgguf.evaluation import matching

    def choose(kept: Sequence[KeptColumn]) -> list[KeptColumn]:
        if contexts:
            kept = matching.columns_of_contexts(kept, contexts)
        if texts:
            lengths = contexts or sorted({column.column.n_ctx for column in kept if column.column.is_text})
            kept = matching.columns_of_text(kept, read_columns(tokenizer, texts, lengths, None))
        return matching.cut_columns(kept, chunks)

    return choose


def keep(
    against: Path,
    place: Place,
    columns: Sequence[Column],
    tokenizer: SourceTokenizer,
    top_k: int,
    options: RunOptions,
) -> None:
    """Write what the original says of the columns."""
    from stepgguf.evaluation.evaluate import keep_reference
    from stepgguf.evaluation.reference_file import reference_bytes, row_form
    from stepgguf.files import disk

    form = row_form(tokenizer.n_vocab, top_k)
    place = replace(place, n_bytes=reference_bytes(columns, form))
    _require_space(place)
    with (
        open_original(against, columns, place, options) as (source, progress),
        disk.disk_errors(place.file),
        disk.replacing(place.file) as file,
    ):
        keep_reference(file, source, columns, form, tokenizer.begin, progress)
    if not options.quiet:
        n, size = sum(column.n_scored for column in columns), readable_size(place.file.stat().st_size)
        fate = "kept" if place.is_kept else "for this run only; --base FILE would keep them for the next"
        output.note(f"{against.name}: {n:,} predictions ({size}), {fate}")


def _require_space(place: Place) -> None:
    """DoesNotFit if the reference would fill the disk."""
    free = shutil.disk_usage(place.file.parent).free
    if place.n_bytes > free:
        raise DoesNotFit(
            f"{place.file.parent}: the reference would take {readable_size(place.n_bytes)}, and {readable_size(free)} "
            "are free",
            hint="Keep less with --top-k 256 or --chunks, or choose another place with --base.",
        )


def compare(
    path: Path,
    place: Place,
    kept: Path,
    against: str,
    choose: Choose,
    tokenizer: SourceTokenizer,
    options: RunOptions,
) -> dict[str, Any]:
    """The figures of a file against a kept reference, in the columns that are chosen. place: of a stream's folder."""
    from stepgguf.evaluation.evaluate import score_columns
    from stepgguf.evaluation.matching import require_vocabulary
    from stepgguf.evaluation.reference_file import ReferenceFile
    from stepgguf.evaluation.result import result_of

    with ReferenceFile(kept) as reference:
        chosen = choose(reference.columns)
        require_vocabulary(chosen, tokenizer.n_vocab)
        columns = [column.column for column in chosen]
        with open_file(path, columns, place, options) as (source, progress):
            scores = score_columns(source, chosen, tokenizer.begin, progress)
            return result_of(path, against, options.engine, chosen[0].form.top_k, columns, scores)
