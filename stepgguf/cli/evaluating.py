"""The steps of an evaluation: columns from texts, what the original says of them into a file, and what another says.

    texts --(tokenizer of FILE)--> columns --(original)--> reference file --(FILE)--> figures

The original runs first and alone, since two models may not fit in memory at once.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepgguf.cli import loading, output
from stepgguf.cli.progress import CountMeter
from stepgguf.errors import DoesNotFit, OutputError
from stepgguf.files.byte_sizes import readable_size

if TYPE_CHECKING:
    from stepgguf.evaluation.columns import Column
    from stepgguf.evaluation.evaluate import Progress
    from stepgguf.evaluation.reference_file import KeptColumn
    from stepgguf.evaluation.sources import LogitSource
    from stepgguf.reference.stream import LayerProgress
    from stepgguf.runtime.llama.model import LlamaModel

CONTEXTS = (512, 2048)
STATES = 3  # hidden states of all tokens that a stream has on the disk at once
Choose = Callable[["Sequence[KeptColumn]"], "list[KeptColumn]"]


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """How models are loaded and run."""

    gpu_layers: int
    threads: int | None
    force: bool
    quiet: bool


def require_free(target: Path, overwrite: bool) -> None:
    """Raise OutputError before anything runs if a file cannot be written later."""
    if target.exists() and not overwrite:
        raise OutputError(f"{target} exists", hint="Choose another name, or replace it with --overwrite.")
    if not target.parent.is_dir():
        raise OutputError(f"{target.parent}: no such folder", hint="Choose another folder, or make this one.")


def _vocabulary(path: Path) -> LlamaModel:
    """The tokenizer and the metadata of a GGUF, without its weights."""
    from stepgguf.convert.sources.splits import split_files
    from stepgguf.runtime.llama.model import LlamaModel

    return LlamaModel(split_files(path)[0], gpu_layers=0, mtp=False, mmap=True, progress=None, vocab_only=True)


def read_columns(
    path: Path, texts: Sequence[Path] | None, contexts: Sequence[int], chunks: int | None
) -> tuple[Column, ...]:
    """What to evaluate, in the tokens of a GGUF. texts None: those that come with the package."""
    from stepgguf.evaluation.texts import default_texts, make_columns

    with closing(_vocabulary(path)) as model:
        return make_columns(model, texts or default_texts(), contexts, chunks)


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
    from stepgguf.evaluation.reference_file import reference_bytes, row_form
    from stepgguf.files import disk

    with closing(_vocabulary(path)) as model:
        begin, form = model.begin, row_form(model.n_vocab, top_k)
    _require_space(kept, reference_bytes(columns, form), "the reference")
    states = kept.with_name(f"{kept.name}.states")
    with (
        _open_original(against, columns, states, options) as (source, progress),
        disk.disk_errors(kept),
        disk.replacing(kept) as file,
    ):
        keep_reference(file, source, columns, form, begin, progress)
    shutil.rmtree(states, ignore_errors=True)  # of a run that was interrupted they stay, and the next goes on with them
    if not options.quiet:
        n = sum(column.n_scored for column in columns)
        output.note(f"{against.name}: {n:,} predictions kept, {readable_size(kept.stat().st_size)}")


def _require_space(place: Path, needed: int, what: str) -> None:
    """DoesNotFit if something would fill the disk."""
    free = shutil.disk_usage(place.parent).free
    if needed > free:
        raise DoesNotFit(
            f"{place.parent}: {what} would take {readable_size(needed)}, and {readable_size(free)} are free",
            hint="Keep less with --top-k 256 or --chunks, or choose another place with --base.",
        )


@contextmanager
def _open_original(
    path: Path, columns: Sequence[Column], folder: Path, options: ModelOptions
) -> Iterator[tuple[LogitSource, Progress]]:
    """What gives logits for the original, and what is told how many are done.

    A GGUF runs in the engine. A checkpoint is streamed, its hidden states in a folder, and shows the layers itself.
    """
    from stepgguf.convert.sources.opening import is_gguf

    if is_gguf(path):
        with _open_gguf(path, columns, options) as opened:
            yield opened
        return
    from stepgguf.convert.sources.checkpoint import Checkpoint
    from stepgguf.evaluation.stream_logits import StreamLogits

    with Checkpoint(path) as checkpoint:
        n_tokens = sum(len(row) for column in columns for row in column.rows)
        _require_space(folder, STATES * 4 * checkpoint.hparams.hidden_size * n_tokens, "the streamed hidden states")
        n_layer = checkpoint.hparams.n_layer
        with CountMeter(checkpoint.name, n_layer, "layers", quiet=options.quiet) as meter:
            yield StreamLogits(checkpoint, folder, options.threads, _count_layers(meter)), lambda n: None


def _count_layers(meter: CountMeter) -> Callable[[LayerProgress], None]:
    """What a stream tells its progress, to show how many layers are done."""
    done = 0

    def show(progress: LayerProgress) -> None:
        nonlocal done
        reached = meter.total if progress.layer is None else progress.layer
        meter.add(reached - done)
        done = reached

    return show


@contextmanager
def _open_gguf(path: Path, columns: Sequence[Column], options: ModelOptions) -> Iterator[tuple[LogitSource, Progress]]:
    """What gives logits for a GGUF, and what shows how many are done."""
    from stepgguf.evaluation.engine_logits import EngineLogits
    from stepgguf.fit.machine import probe_machine

    threads = options.threads or probe_machine().cores
    n_ctx = max(column.n_ctx for column in columns)
    with loading.open_layers(
        path, n_ctx, gpu_layers=options.gpu_layers, force=options.force, command="eval", quiet=options.quiet
    ) as model:
        total = sum(column.n_scored for column in columns)
        with CountMeter(path.name, total, "predictions", quiet=options.quiet) as meter:
            yield EngineLogits(model, threads), meter.add


def compare(path: Path, kept: Path, against: str, choose: Choose, options: ModelOptions) -> dict[str, Any]:
    """The figures of a file against a kept reference, in the columns that are chosen."""
    from stepgguf.evaluation.divergence import divergence
    from stepgguf.evaluation.evaluate import score_columns
    from stepgguf.evaluation.matching import require_vocabulary
    from stepgguf.evaluation.reference_file import ReferenceFile
    from stepgguf.evaluation.result import result_of

    with ReferenceFile(kept) as reference:
        chosen = choose(reference.columns)
        columns = [column.column for column in chosen]
        with closing(_vocabulary(path)) as model:
            require_vocabulary(chosen, model.n_vocab)
            begin = model.begin
        with _open_gguf(path, columns, options) as (source, progress):
            found = [divergence(scores) for scores in score_columns(source, chosen, begin, progress)]
        return result_of(path, against, chosen[0].form.top_k, columns, found)
