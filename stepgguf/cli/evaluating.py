"""The steps of an evaluation: columns from texts, what the original says of them into a file, and what another says.

    texts --(tokenizer of FILE)--> columns --(original)--> reference file --(FILE)--> figures

The original runs first and alone, since two models may not fit in memory at once.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from stepgguf.cli import loading, output
from stepgguf.cli.progress import CountMeter
from stepgguf.errors import DoesNotFit
from stepgguf.files.byte_sizes import readable_size

if TYPE_CHECKING:
    from stepgguf.evaluation.columns import Column
    from stepgguf.evaluation.reference_file import KeptColumn, RowForm
    from stepgguf.evaluation.sources import LogitSource
    from stepgguf.runtime.llama.model import LlamaModel

CONTEXTS = (512, 2048)
Choose = Callable[["Sequence[KeptColumn]"], "list[KeptColumn]"]


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """How models are loaded and run."""

    gpu_layers: int
    threads: int | None
    force: bool
    quiet: bool


def _vocabulary(path: Path) -> LlamaModel:
    """The tokenizer and the metadata of a GGUF, without its weights."""
    from stepgguf.convert.sources.splits import split_files
    from stepgguf.runtime.llama.model import LlamaModel

    return LlamaModel(split_files(path)[0], gpu_layers=0, mtp=False, mmap=True, progress=None, vocab_only=True)


def read_columns(path: Path, texts: Sequence[Path], contexts: Sequence[int], chunks: int | None) -> tuple[Column, ...]:
    """What to evaluate, in the tokens of a GGUF."""
    from stepgguf.evaluation.texts import make_columns

    if not texts:
        raise typer.BadParameter("a text is needed: --against is no BASE that has one", param_hint="--text")
    with closing(_vocabulary(path)) as model:
        return make_columns(model, texts, contexts, chunks)


def chooser(path: Path, texts: Sequence[Path] | None, contexts: Sequence[int] | None, chunks: int | None) -> Choose:
    """What chooses among the columns of a BASE by the options that were given."""
    from stepgguf.evaluation import matching

    def choose(kept: Sequence[KeptColumn]) -> list[KeptColumn]:
        if contexts:
            kept = matching.columns_of_contexts(kept, contexts)
        if texts:
            lengths = contexts or sorted({column.column.n_ctx for column in kept if column.column.is_text})
            kept = matching.columns_of_text(kept, read_columns(path, texts, lengths or CONTEXTS, None))
        return matching.cut_columns(kept, chunks)

    return choose


@contextmanager
def kept_at(base: Path | None) -> Iterator[Path]:
    """Where the reference is kept: at --base, or for this run only."""
    if base is not None:
        yield base
        return
    with tempfile.TemporaryDirectory(prefix="stepgguf-") as folder:
        yield Path(folder) / "reference"


def keep(path: Path, against: Path, kept: Path, columns: Sequence[Column], top_k: int, options: ModelOptions) -> None:
    """Write what the original says of the columns."""
    from stepgguf.evaluation.evaluate import keep_reference
    from stepgguf.evaluation.reference_file import row_form
    from stepgguf.files import disk

    with closing(_vocabulary(path)) as model:
        begin, form = model.begin, row_form(model.n_vocab, top_k)
    _require_space(kept, columns, form)
    total = sum(column.n_scored for column in columns)
    n_ctx = max(column.n_ctx for column in columns)
    with (
        _open_source(against, n_ctx, options) as source,
        disk.disk_errors(kept),
        disk.replacing(kept) as file,
        CountMeter(against.name, total, "predictions", quiet=options.quiet) as meter,
    ):
        keep_reference(file, source, columns, form, begin, meter.add)
    if not options.quiet:
        output.note(f"{against.name}: {total:,} predictions kept, {readable_size(kept.stat().st_size)}")


def _require_space(kept: Path, columns: Sequence[Column], form: RowForm) -> None:
    """DoesNotFit if the reference would fill the disk."""
    from stepgguf.evaluation.reference_file import reference_bytes

    needed, free = reference_bytes(columns, form), shutil.disk_usage(kept.parent).free
    if needed > free:
        raise DoesNotFit(
            f"{kept.parent}: the reference takes {readable_size(needed)}, and {readable_size(free)} are free",
            hint="Keep less with --top-k 256 or --chunks, or choose another place with --base.",
        )


@contextmanager
def _open_source(path: Path, n_ctx: int, options: ModelOptions) -> Iterator[LogitSource]:
    """What gives logits for a GGUF or a checkpoint."""
    from stepgguf.convert.sources.opening import is_gguf

    if not is_gguf(path):
        yield _load_checkpoint(path)
        return
    from stepgguf.evaluation.engine_logits import EngineLogits
    from stepgguf.fit.machine import probe_machine

    threads = options.threads or probe_machine().cores
    with loading.open_layers(
        path, n_ctx, gpu_layers=options.gpu_layers, force=options.force, command="eval", quiet=options.quiet
    ) as model:
        yield EngineLogits(model, threads)


def _load_checkpoint(path: Path) -> LogitSource:
    """DoesNotFit for a checkpoint that is larger than the memory."""
    from stepgguf.convert.sources.checkpoint import Checkpoint
    from stepgguf.evaluation.checkpoint_logits import CheckpointLogits
    from stepgguf.fit.machine import probe_machine

    with Checkpoint(path) as checkpoint:
        needed = sum(4 * math.prod(tensor.shape) for tensor in checkpoint.tensors.values())
        if needed > probe_machine().ram_available > 0:
            raise DoesNotFit(
                f"{path}: in float32 it takes {readable_size(needed)}, more than there is free memory",
                hint="Convert it to a type that fits, e.g. Q8_0, and give that file to --against.",
            )
        return CheckpointLogits(checkpoint)


def compare(
    path: Path,
    kept: Path,
    against: str,
    choose: Choose,
    options: ModelOptions,
) -> dict[str, Any]:
    """The figures of a file against a kept reference, in the columns that are chosen."""
    from stepgguf.evaluation.divergence import divergence
    from stepgguf.evaluation.evaluate import score_columns
    from stepgguf.evaluation.reference_file import ReferenceFile
    from stepgguf.evaluation.result import result_of

    with ReferenceFile(kept) as reference:
        chosen = choose(reference.columns)
        columns = [column.column for column in chosen]
        total, n_ctx = sum(column.n_scored for column in columns), max(column.n_ctx for column in columns)
        with closing(_vocabulary(path)) as model:
            begin = model.begin
        with (
            _open_source(path, n_ctx, options) as source,
            CountMeter(path.name, total, "predictions", quiet=options.quiet) as meter,
        ):
            found = [divergence(scores) for scores in score_columns(source, chosen, begin, meter.add)]
        return result_of(path, against, chosen[0].form.top_k, columns, found)
