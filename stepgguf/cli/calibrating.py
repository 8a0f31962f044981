"""Calibrated codes in the terminal: the text, what the passes take, and the passes themselves."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import typer

from stepgguf.calibration.conversion import calibrate_units
from stepgguf.calibration.text import TextReader, default_texts
from stepgguf.calibration.token_weights import TokenWeights, read_token_weights
from stepgguf.calibration.work_folder import work_folder
from stepgguf.cli import output
from stepgguf.cli.stream_progress import StreamMeter
from stepgguf.convert.sources.full_hparams import full_hparams
from stepgguf.convert.sources.source import TensorSource
from stepgguf.convert.writer import Writer
from stepgguf.files.byte_sizes import readable_size
from stepgguf.reference.backward import BackwardStream
from stepgguf.reference.device import DeviceName, open_device
from stepgguf.reference.stream import LayerStream
from stepgguf.reference.weights import WeightReader

DEFAULT_TEXT = "default"  # stands for the texts that come with the package
ROW_TOKENS = 2048  # four sliding windows of the published models


class CalibrationRun:
    """The calibration of one conversion: its text, and the passes that choose codes for it."""

    def __init__(
        self, source: TensorSource, texts: Sequence[str], n_tokens: int | None, device: DeviceName, threads: int | None
    ) -> None:
        paths = [path for text in texts for path in (default_texts() if text == DEFAULT_TEXT else [Path(text)])]
        hp = full_hparams(source).without_mtp()
        self._reader = WeightReader(source, hp, open_device(device, threads))
        length = min(ROW_TOKENS, hp.max_position)
        self.rows = TextReader(source, length).read(paths)[: n_tokens and max(1, n_tokens // length)]
        digest = hashlib.sha256(self.rows.tokens.tobytes() + self.rows.documents.tobytes()).hexdigest()
        self.label = f"{self.rows.n_tokens} tokens of {', '.join(path.name for path in paths)} (sha256 {digest[:16]})"

    def make_units(self, writer: Writer, *, quiet: bool) -> None:
        """Run all passes; the writer then has the units of the trunk's matrices. Ctrl+C keeps what is done.

        The working files lie beside the output, and are removed at the end.
        """
        path = writer.plan.files[0].path
        folder = path.with_name(f"{path.name}.calibration")
        try:
            with work_folder(folder, self.disk_bytes) as place:
                self._run_passes(writer, place, quiet)
        except KeyboardInterrupt:
            output.note(f"interrupted; {folder} keeps the layers that are done: repeat the command to go on from there")
            raise typer.Exit(130) from None

    @property
    def disk_bytes(self) -> int:
        """The most that working files take: what enters each layer is kept for the pass backwards."""
        hp = self._reader.hp
        return 4 * self.rows.tokens.size * hp.hidden_size * (hp.n_layer + 6)

    def _run_passes(self, writer: Writer, folder: Path, quiet: bool) -> None:
        with StreamMeter("exact model", quiet=quiet) as meter:
            stream = LayerStream(self._reader, self.rows, folder / "exact", keep_inputs=True, progress=meter.show)
            stream.run_trunk()
        weights = TokenWeights(self.rows.text.size, self._reader.hp.vocab_size)
        with StreamMeter("gradients", quiet=quiet) as meter:
            backward = BackwardStream(stream, observers=[weights], progress=meter.show)
            backward.run()
        with StreamMeter("codes", quiet=quiet) as meter:
            calibrate_units(
                self._reader,
                writer,
                self.rows,
                folder,
                token_weights=lambda name: read_token_weights(backward, name),
                progress=meter.show,
            )

    def say_what_it_takes(self) -> None:
        """Say which text is run, and the room on the disk."""
        output.note(
            f"calibration: {self.label}, three passes over the model, up to {readable_size(self.disk_bytes)} of "
            "working files beside the output"
        )
