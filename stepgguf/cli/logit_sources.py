"""Who gives logits in an evaluation: llama.cpp for a GGUF that fits, or the layer stream for whatever can be opened."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import typer

from stepgguf.cli import engine_options, loading, output
from stepgguf.cli.progress import CountMeter
from stepgguf.cli.stream_progress import StreamMeter
from stepgguf.errors import DoesNotFit
from stepgguf.files.byte_sizes import readable_size

if TYPE_CHECKING:
    from stepgguf.evaluation.columns import Column
    from stepgguf.evaluation.evaluate import Progress
    from stepgguf.evaluation.sources import LogitSource
    from stepgguf.evaluation.stream_logits import StreamLogits
    from stepgguf.reference import DeviceName

EngineName = Literal["llama-cpp-python", "stream"]
Opened = tuple["LogitSource", "Progress"]  # and what is to be told how many predictions are done


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How models are run. engine: what runs GGUFs. device: of a stream. force: load what does not fit."""

    engine: EngineName
    device: DeviceName
    gpu_layers: int | None
    threads: int | None
    force: bool
    quiet: bool


@dataclass(frozen=True, slots=True)
class Place:
    """Where a file is to be written, and a stream's working folder beside it, which an interruption leaves.

    is_kept: False where all of it goes when the command ends. n_bytes: what the file will take.
    """

    file: Path
    is_kept: bool
    n_bytes: int = 0

    @property
    def stream_folder(self) -> Path:
        """The folder for hidden states."""
        return self.file.with_name(f"{self.file.name}.stream")


@contextmanager
def place_at(target: Path | None) -> Iterator[Place]:
    """The place of a file that is kept, or without one a temporary place."""
    if target is not None:
        yield Place(target, is_kept=True)
        return
    with tempfile.TemporaryDirectory(prefix="stepgguf-") as folder:
        yield Place(Path(folder) / "reference", is_kept=False)


def choose_engine(asked: EngineName | None, *, quiet: bool) -> EngineName:
    """The engine that was asked for; else llama.cpp, or the stream where that is not installed."""
    if asked is not None:
        return asked
    if find_spec("llama_cpp") is not None:
        return "llama-cpp-python"
    if not quiet:
        output.note(f"{engine_options.IN_PROCESS} is not installed: the file is streamed, layer by layer")
    return "stream"


@contextmanager
def open_file(path: Path, columns: Sequence[Column], place: Place, options: RunOptions) -> Iterator[Opened]:
    """The evaluated file, in the engine that was chosen: another would measure something else."""
    with ExitStack() as stack:
        if options.engine == "stream":
            yield stack.enter_context(_open_stream(path, columns, place, options))
            return
        try:
            opened = stack.enter_context(_open_engine(path, columns, options))
        except DoesNotFit as error:
            raise DoesNotFit(error.message, hint=f"{error.hint}  Or let it be streamed: --engine stream") from error
        yield opened


@contextmanager
def open_original(path: Path, columns: Sequence[Column], place: Place, options: RunOptions) -> Iterator[Opened]:
    """The original: a checkpoint is streamed; a GGUF runs as the evaluated file does, or is streamed if it is too large
    for that."""
    from stepgguf.convert.sources.opening import is_gguf

    with ExitStack() as stack:
        if options.engine == "stream" or not is_gguf(path):
            yield stack.enter_context(_open_stream(path, columns, place, options))
            return
        try:
            opened = stack.enter_context(_open_engine(path, columns, options))
        except DoesNotFit as error:
            if not options.quiet:
                output.note(f"{error.message}; so it is streamed, layer by layer")
            opened = stack.enter_context(_open_stream(path, columns, place, options))
        yield opened


@contextmanager
def _open_engine(path: Path, columns: Sequence[Column], options: RunOptions) -> Iterator[Opened]:
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


@contextmanager
def _open_stream(path: Path, columns: Sequence[Column], place: Place, options: RunOptions) -> Iterator[Opened]:
    """Shows the layers itself. Ctrl+C keeps those that are done where the place is kept, and exits with 130."""
    from stepgguf.calibration.work_folder import work_folder
    from stepgguf.convert.sources.opening import open_source
    from stepgguf.evaluation.stream_logits import StreamLogits
    from stepgguf.reference.device import open_device

    device, folder = open_device(options.device, options.threads), place.stream_folder
    with open_source(path) as source, StreamMeter(source.name, quiet=options.quiet) as meter:
        logits = StreamLogits(source, device, folder / "states", meter.show)
        n_disk = _say_what_it_takes(logits, columns, folder, options)
        try:
            with work_folder(folder, n_disk + place.n_bytes):
                meter.restart()
                yield logits, lambda n: None
        except KeyboardInterrupt:
            kept = f"{folder} keeps the layers that are done: repeat the command to go on from there"
            lost = "with --base FILE for the original, or -o for the file, the same command would go on from here"
            output.note(f"interrupted at {meter.share:.0%}; {kept if place.is_kept else lost}")
            raise typer.Exit(130) from None


def _say_what_it_takes(logits: StreamLogits, columns: Sequence[Column], folder: Path, options: RunOptions) -> int:
    """The bytes of the working files. DoesNotFit for more tokens in a row than the model was trained for."""
    from stepgguf.calibration.footprint import stream_footprint
    from stepgguf.evaluation.stream_logits import group_rows, token_rows

    rows = token_rows(group_rows([row for column in columns for row in column.scored_rows(None)]))
    if rows.row_length > logits.hp.max_position:
        raise DoesNotFit(
            f"{logits.name}: a row of {rows.row_length:,} tokens is longer than the {logits.hp.max_position:,} that "
            "the model was trained for",
            hint="Give a smaller --ctx, or shorter dialogues.",
        )
    takes = stream_footprint(logits.hp, rows)
    if not options.quiet:
        output.note(
            f"{logits.name}: {rows.n_tokens:,} tokens through {output.counted(logits.hp.n_layer, 'layer')}, each read "
            f"once; about {readable_size(takes.memory)} of memory, and up to {readable_size(takes.disk)} of working "
            f"files in {folder}"
        )
    return takes.disk
