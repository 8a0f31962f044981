"""Calibrated codes in the terminal: the text, what the passes take, and the passes themselves."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import typer

from stepgguf.calibration.conversion import calibrate_units
from stepgguf.calibration.fisher_costs import FisherCosts
from stepgguf.calibration.text import TextReader, default_texts
from stepgguf.calibration.token_weights import TokenWeights, read_token_weights
from stepgguf.calibration.work_folder import work_folder
from stepgguf.cli import output
from stepgguf.cli.stream_progress import StreamMeter
from stepgguf.convert.cost_file import TypeCosts
from stepgguf.convert.importance import Importance
from stepgguf.convert.sources.full_hparams import full_hparams
from stepgguf.convert.sources.source import TensorSource
from stepgguf.convert.writer import Writer
from stepgguf.files.byte_sizes import readable_size
from stepgguf.reference.backward import BackwardStream, GradientObserver
from stepgguf.reference.device import DeviceName, open_device
from stepgguf.reference.stream import LayerStream
from stepgguf.reference.weights import WeightReader

DEFAULT_TEXT = "default"  # stands for the texts that come with the package
ROW_TOKENS = 2048  # four sliding windows of the published models


class CalibrationRun:
    """The calibration of one conversion: its text, and the passes that choose types and codes for it.

    A context manager: the working files, which lie beside the output `dest`, are removed when it is left without an
    error, and kept for the same command else.
    """

    def __init__(
        self,
        source: TensorSource,
        texts: Sequence[str],
        n_tokens: int | None,
        dest: Path,
        *,
        device: DeviceName,
        threads: int | None,
        quiet: bool,
    ) -> None:
        self._source, self._threads, self._quiet = source, threads, quiet
        self._folder = dest.with_name(f"{dest.name}.calibration")
        paths = [path for text in texts for path in (default_texts() if text == DEFAULT_TEXT else [Path(text)])]
        self._hp = full_hparams(source).without_mtp()
        self._reader = WeightReader(source, self._hp, open_device(device, threads))
        length = min(ROW_TOKENS, self._hp.max_position)
        self._rows = TextReader(source, length).read(paths)[: n_tokens and max(1, n_tokens // length)]
        digest = hashlib.sha256(self._rows.tokens.tobytes() + self._rows.documents.tobytes()).hexdigest()
        names = ", ".join(path.name for path in paths)
        self.label = f"{self._rows.n_tokens} tokens of {names} (sha256 {digest[:16]})"
        self._weights = TokenWeights(self._rows.text.size, self._hp.vocab_size)
        self._costs: FisherCosts | None = None
        self._files = ExitStack()
        self._backward: BackwardStream | None = None  # once it has run

    @property
    def disk_bytes(self) -> int:
        """The most that working files take: what enters each layer is kept for the other passes."""
        return 4 * self._rows.tokens.size * self._hp.hidden_size * (self._hp.n_layer + 6)

    def say_what_it_takes(self) -> None:
        """Say which text is run, and the room on the disk."""
        output.note(
            f"calibration: {self.label}, three passes over the model, up to {readable_size(self.disk_bytes)} of "
            f"working files in {self._folder}"
        )

    def find_costs(self, importance: Importance | None) -> TypeCosts:
        """What each type would cost each tensor, by the gradients."""
        self._costs = FisherCosts(
            self._source,
            importance,
            int(self._rows.predicted.sum()),
            threads=self._threads,
            compiling=self._note_compiling,
        )
        return self._costs.costs(self._run_backward())

    def make_units(self, writer: Writer) -> None:
        """Choose the codes; the writer then has the units of the trunk's matrices."""
        backward = self._run_backward()
        with StreamMeter("codes", quiet=self._quiet) as meter:
            calibrate_units(
                backward.stream,
                writer,
                token_weights=lambda name: read_token_weights(backward, name),
                progress=meter.show,
            )

    def _run_backward(self) -> BackwardStream:
        """The passes of the exact model, forwards and backwards; run once."""
        if self._backward is None:
            folder = self._files.enter_context(work_folder(self._folder, self.disk_bytes))
            with StreamMeter("exact model", quiet=self._quiet) as meter:
                stream = LayerStream(self._reader, self._rows, folder / "states", keep_inputs=True, progress=meter.show)
                stream.run_trunk()
            observers: list[GradientObserver] = [self._weights]
            observers += [self._costs] if self._costs is not None else []
            with StreamMeter("gradients", quiet=self._quiet) as meter:
                self._backward = BackwardStream(stream, observers=observers, progress=meter.show)
                self._backward.run()
        return self._backward

    def _note_compiling(self, name: str) -> None:
        if not self._quiet:
            output.note(f"compiling the {name} kernel (once on this machine)")

    def __enter__(self) -> CalibrationRun:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.__exit__(kind, error, trace)
        if isinstance(error, KeyboardInterrupt):
            output.note(f"interrupted; {self._folder} keeps the layers that are done: repeat the command to go on")
            raise typer.Exit(130) from None
