"""Calibrated codes in the terminal: the text, what the passes take, and the passes themselves."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import typer

from stepgguf.calibration.conversion import CalibratedUnits, calibrate_units
from stepgguf.calibration.fisher_costs import FisherCosts
from stepgguf.calibration.guard import with_guard
from stepgguf.calibration.text import TextReader, default_texts
from stepgguf.calibration.token_weights import TokenWeights, read_token_weights
from stepgguf.calibration.work_folder import work_folder
from stepgguf.cli import output
from stepgguf.cli.calibration_estimate import CalibrationEstimate
from stepgguf.cli.progress import say_compiling
from stepgguf.cli.stream_progress import StreamMeter
from stepgguf.convert.cost_file import TypeCosts
from stepgguf.convert.importance import Importance
from stepgguf.convert.sources.full_hparams import full_hparams
from stepgguf.convert.sources.source import TensorSource
from stepgguf.convert.writer import Writer
from stepgguf.errors import CorruptTensor
from stepgguf.files import disk
from stepgguf.reference import DeviceName
from stepgguf.reference.backward import BackwardStream, GradientObserver
from stepgguf.reference.device import open_device
from stepgguf.reference.stream import LayerStream
from stepgguf.reference.weights import WeightReader

DEFAULT_TEXT = "default"  # stands for the texts that come with the package
ROW_TOKENS = 2048  # four sliding windows of the published models


class CalibrationRun:
    """The calibration of one conversion: its text, and the passes that choose types and codes for it.

    A context manager: the working files in `folder` are removed when the codes are chosen, or when it is left without
    an error, and kept for the same command else.
    """

    def __init__(
        self,
        source: TensorSource,
        texts: Sequence[str],
        n_tokens: int | None,
        folder: Path,
        *,
        device: DeviceName,
        threads: int | None,
        memory: int | None,
        quiet: bool,
    ) -> None:
        self._source, self._folder, self._threads, self._quiet = source, folder, threads, quiet
        paths = [path for text in texts for path in (default_texts() if text == DEFAULT_TEXT else [Path(text)])]
        self._hp = full_hparams(source).without_mtp()
        self._reader = WeightReader(source, self._hp, open_device(device, threads))
        length = min(ROW_TOKENS, self._hp.max_position)
        text = TextReader(source, length).read(paths)[: n_tokens and max(1, n_tokens // length)]
        self._rows = with_guard(text, self._hp.vocab_size)
        names = ", ".join(path.name for path in paths)
        self.label = f"{text.n_tokens} tokens of {names} (sha256 {self._rows.digest[:16]})"
        self._estimate = CalibrationEstimate(source, self._reader, self._rows, threads, memory)
        self._weights = TokenWeights(self._rows.text.size, self._hp.vocab_size)
        self._costs: FisherCosts | None = None
        self._files = ExitStack()
        self._backward: BackwardStream | None = None  # once it has run

    @property
    def disk_bytes(self) -> int:
        """The most that working files take: what enters each layer is kept for the other passes."""
        return self._estimate.footprint.disk

    @property
    def missing_bytes(self) -> int:
        """What they need of the disk besides those that an interrupted run left."""
        return max(0, self.disk_bytes - disk.used_bytes(self._folder))

    def say_what_it_takes(self) -> None:
        """Say which text is run, and the time, the memory and the room on the disk that it takes."""
        output.note(f"calibration: {self.label}, three passes over the model")
        self._estimate.say(self._folder)

    def report(self) -> dict[str, Any]:
        """The same as data."""
        return {"text": self.label} | self._estimate.report()

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
        """Choose the codes; the writer then has the units of the trunk's matrices, and the working files are gone."""
        units = CalibratedUnits(writer, self._hp.n_layer)
        if units.are_finished:
            self._files.enter_context(work_folder(self._folder, 0))
        else:
            with disk.disk_errors(writer.plan.files[0].path):
                self._choose_codes(units, writer)
        self._files.close()

    def _choose_codes(self, units: CalibratedUnits, writer: Writer) -> None:
        backward = self._run_backward()
        with StreamMeter("codes", quiet=self._quiet) as meter:
            calibrate_units(
                units,
                writer,
                backward.stream,
                lambda name: read_token_weights(backward, name),
                backward.folder.states(0),
                n_threads=self._estimate.n_threads,
                progress=meter.show,
            )

    def _run_backward(self) -> BackwardStream:
        """The passes of the exact model, forwards and backwards; run once."""
        if self._backward is None:
            folder = self._files.enter_context(work_folder(self._folder, self.disk_bytes))
            with StreamMeter("exact model", quiet=self._quiet) as meter:
                stream = LayerStream(self._reader, self._rows, folder / "states", keep_inputs=True, progress=meter.show)
                stream.run_trunk()
            self._check_finite(stream)
            observers: list[GradientObserver] = [self._weights]
            observers += [self._costs] if self._costs is not None else []
            with StreamMeter("gradients", quiet=self._quiet) as meter:
                self._backward = BackwardStream(stream, observers=observers, progress=meter.show)
                self._backward.run()
        return self._backward

    def _check_finite(self, stream: LayerStream) -> None:
        if not np.isfinite(stream.folder.states(self._hp.n_layer).sum(dtype=np.float64)):
            raise CorruptTensor(
                f"{self._source.path}: on this text, the model's hidden states are not finite",
                hint="A weight is damaged: the same command without --calibrate names it. Download its file again.",
            )

    def _note_compiling(self, name: str) -> None:
        if not self._quiet:
            say_compiling(name)

    def __enter__(self) -> CalibrationRun:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.__exit__(kind, error, trace)
        if isinstance(error, KeyboardInterrupt):
            output.note(f"interrupted; {self._folder} keeps the layers that are done: repeat the command to go on")
            raise typer.Exit(130) from None
