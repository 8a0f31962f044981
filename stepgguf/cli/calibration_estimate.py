"""What a calibration takes, as text and as data: computing and reading by pass, memory, and room on the disk."""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path
from typing import Any

from stepgguf.calibration.footprint import calibration_footprint, expert_threads
from stepgguf.calibration.work import Speed, calibration_work, measure_speed
from stepgguf.cli import output
from stepgguf.cli.progress import clock
from stepgguf.convert.sources.source import TensorSource
from stepgguf.files.byte_sizes import readable_size
from stepgguf.reference.token_rows import TokenRows
from stepgguf.reference.weights import WeightReader


class CalibrationEstimate:
    """Of the rows of a text. n_threads: that work on an expert each, as many as fit into `memory` bytes if it is given.

    Types that are chosen by gradients (--fit) take a little more.
    """

    def __init__(
        self, source: TensorSource, reader: WeightReader, rows: TokenRows, threads: int | None, memory: int | None
    ) -> None:
        self._device, self._rows = reader.device, rows
        self.n_threads = threads or os.cpu_count() or 1
        if memory is not None:
            self.n_threads = expert_threads(reader.hp, rows, self.n_threads, memory)
        self.footprint = calibration_footprint(reader.hp, rows, self.n_threads)
        self._work = calibration_work(reader.hp, rows)
        trunk = [source.tensors[spec.source] for spec in source.specs if not spec.is_mtp]
        self._n_read = len(self._work) * sum(tensor.n_bytes for tensor in trunk)

    def say(self, folder: Path) -> None:
        """Say it in two lines. folder: of the working files."""
        seconds = {name: sum(map(self._speed.seconds, parts.values())) for name, parts in self._work.items()}
        passes = ", ".join(f"{name} {clock(taken)}" for name, taken in seconds.items())
        output.note(
            f"about {clock(sum(seconds.values()))} of computing on this machine, which multiplies matrices at "
            f"{2e-9 * self._speed.device:,.0f} GFLOP/s now: {passes}; {readable_size(self._n_read)} are read"
        )
        output.note(
            f"about {readable_size(self.footprint.memory)} of memory, and up to {readable_size(self.footprint.disk)} "
            f"of working files in {folder}"
        )

    def report(self) -> dict[str, Any]:
        """The same as data."""
        return {
            "tokens": self._rows.n_tokens,
            "passes": {
                name: {
                    part: {"flop": work.flop, "seconds": round(self._speed.seconds(work), 1)}
                    for part, work in parts.items()
                }
                for name, parts in self._work.items()
            },
            "read_bytes": self._n_read,
            "memory_bytes": self.footprint.memory,
            "disk_bytes": self.footprint.disk,
        }

    @cached_property
    def _speed(self) -> Speed:
        return measure_speed(self._device, self.n_threads)
