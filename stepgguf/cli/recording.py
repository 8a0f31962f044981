"""Recording an importance matrix in the terminal: what it takes, the run, and what each expert has seen."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import typer

from stepgguf.calibration.footprint import imatrix_footprint
from stepgguf.calibration.imatrix import ThinExpert, collect_imatrix, experts_below, growing_parts, whole_text
from stepgguf.calibration.work import Speed, imatrix_work, measure_speed
from stepgguf.calibration.work_folder import work_folder
from stepgguf.cli import output
from stepgguf.cli.conversion import peak_rss
from stepgguf.cli.progress import clock
from stepgguf.cli.stream_progress import StreamMeter
from stepgguf.files.byte_sizes import readable_size
from stepgguf.model.tensors import tensor_specs
from stepgguf.quants.coverage import Coverage, check_coverage
from stepgguf.quants.imatrix import THIN_TOKENS, Imatrix, write_imatrix
from stepgguf.reference.token_rows import TokenRows
from stepgguf.reference.weights import WeightReader

_LISTED = 8  # layers, and experts of a layer, that a warning names


class ImatrixRun:
    """One importance matrix to be recorded: of a model, on rows of tokens, into the file `target`."""

    def __init__(
        self, reader: WeightReader, rows: TokenRows, datasets: Sequence[str], target: Path, *, quiet: bool = False
    ) -> None:
        self._reader, self._rows, self._datasets, self._target, self._quiet = reader, rows, datasets, target, quiet
        self._folder = target.with_name(f"{target.name}.stream")
        self._footprint, self._work = imatrix_footprint(reader.hp, rows), imatrix_work(reader.hp, rows)

    def say_what_it_takes(self) -> None:
        """Say what will run, and the time, the memory and the room on the disk that it will take."""
        rows, hp, takes = self._rows, self._reader.hp, self._footprint
        output.note(
            f"{rows.n_tokens:,} tokens of {output.counted(len(self._datasets), 'text')} in "
            f"{output.counted(rows.n_rows, 'chunk')} of {rows.row_length}, through "
            f"{output.counted(hp.n_layer, 'layer')} and {output.counted(hp.n_mtp, 'MTP block')}"
        )
        output.note(
            f"about {clock(self._speed.seconds(self._work))} of computing on this machine, which multiplies matrices "
            f"at {2e-9 * self._speed.device:,.0f} GFLOP/s now"
        )
        output.note(
            f"about {readable_size(takes.memory)} of memory, and up to {readable_size(takes.disk)} of working files in "
            f"{self._folder}, which the system keeps in memory as far as there is room"
        )

    def plan_report(self) -> dict[str, Any]:
        """What will run, as data."""
        return {
            "output": str(self._target),
            "texts": list(self._datasets),
            "tokens": self._rows.n_tokens,
            "chunks": self._rows.n_rows,
            "chunk_size": self._rows.row_length,
            "flop": self._work.flop,
            "predicted_seconds": round(self._speed.seconds(self._work), 1),
            "memory_bytes": self._footprint.memory,
            "disk_bytes": self._footprint.disk,
        }

    @cached_property
    def _speed(self) -> Speed:
        return measure_speed(self._reader.device)

    def record(self, balance: int | None) -> Recorded:
        """Run the text and write the file; with `balance`, until each expert has seen so many tokens.

        Ctrl+C keeps what is done and exits with 130.
        """
        started, n_enough = time.monotonic(), balance or 0
        parts = whole_text(self._rows) if balance is None else growing_parts(self._rows)
        with StreamMeter("imatrix", quiet=self._quiet) as meter:
            try:
                with work_folder(self._folder, self._footprint.disk) as folder:
                    matrices = collect_imatrix(
                        self._reader, self._rows, parts, folder, datasets=self._datasets, progress=meter.show
                    )
                    for made in matrices:
                        below = experts_below(made, n_enough)
                        if not below:
                            break
                        meter.restart()
                        self._say_who_is_below(made, below, n_enough)
                    write_imatrix(made, self._target)
            except KeyboardInterrupt:
                output.note(
                    f"interrupted at {meter.share:.0%}; {self._folder} keeps the layers that are done: repeat the "
                    "command to go on from there"
                )
                raise typer.Exit(130) from None
        matrices_of_model = [spec for spec in tensor_specs(self._reader.hp) if spec.is_quantizable]
        coverage = check_coverage(made, matrices_of_model)
        return Recorded(self._target, made, coverage, balance, below, time.monotonic() - started)

    def _say_who_is_below(self, made: Imatrix, below: Sequence[ThinExpert], n_tokens: int) -> None:
        if not self._quiet:
            output.note(
                f"after {made.chunk_count} of {output.counted(self._rows.n_rows, 'chunk')} "
                f"{output.counted(len(below), 'expert')} have seen fewer than {n_tokens:,} tokens"
            )


@dataclass(frozen=True, slots=True)
class Recorded:
    """An importance matrix that was written. below: the experts that `balance` asked more tokens for."""

    path: Path
    imatrix: Imatrix
    coverage: Coverage
    balance: int | None
    below: Sequence[ThinExpert]
    seconds: float

    def show(self, *, quiet: bool) -> None:
        """Say what was written and what each expert has seen; `quiet` leaves the warnings."""
        if not quiet:
            made = self.imatrix
            output.note(
                f"wrote {self.path} ({readable_size(self.path.stat().st_size)}): {len(made.entries)} tensors from "
                f"{output.counted(made.chunk_count, 'chunk')}, {self.seconds:.1f} s, peak memory "
                f"{readable_size(peak_rss())}"
            )
            for line in self._layer_lines():
                output.note(line)
        output.warn([*self.coverage.warnings, *self._balance_warnings()])

    def report(self) -> dict[str, Any]:
        """The same as data."""
        return {
            "bytes": self.path.stat().st_size,
            "tensors": len(self.imatrix.entries),
            "chunks_run": self.imatrix.chunk_count,
            "seconds": round(self.seconds, 3),
            "peak_rss_bytes": peak_rss(),
            "layers": [asdict(layer) for layer in self.coverage.layers],
            "balance": self.balance,
            "below_balance": [asdict(expert) for expert in self.below],
        }

    def _layer_lines(self) -> Iterator[str]:
        """Tokens of an expert in the layers where the least seen one has fewest."""
        layers = sorted(self.coverage.layers, key=lambda row: (row.least or 0, row.layer))
        yield f"layer  experts  not seen  {f'below {THIN_TOKENS}':>9}   fewest     median"
        for row in layers[:_LISTED]:
            yield (
                f"{row.layer:>5}  {row.n_expert:>7}  {row.unseen:>8}  {row.thin or 0:>9}  {row.least or 0:>7,}  "
                f"{row.median or 0:>9,.0f}"
            )
        if len(layers) > _LISTED:
            yield f"{output.counted(len(layers) - _LISTED, 'layer')} more, where no expert has seen fewer"

    def _balance_warnings(self) -> Iterator[str]:
        """Who has not seen what `balance` asked for, by layer."""
        if not self.below:
            return
        by_layer = [list(group) for _, group in groupby(self.below, key=lambda expert: expert.layer)]
        yield (
            f"the text ended before {output.counted(len(self.below), 'expert')} in "
            f"{output.counted(len(by_layer), 'layer')} had seen {self.balance:,} tokens"
        )
        for group in sorted(by_layer, key=len, reverse=True)[:_LISTED]:
            few = sorted(group, key=lambda expert: expert.tokens)
            named = ", ".join(f"{expert.expert} ({expert.tokens:,})" for expert in few[:_LISTED])
            more = f" and {len(few) - _LISTED} more" if len(few) > _LISTED else ""
            yield f"layer {few[0].layer}: expert (tokens) {named}{more}"
