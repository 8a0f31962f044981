"""Carrying out a plan in the terminal: what convert, quantize and demo share."""

from __future__ import annotations

import resource
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.text import Text

from stepgguf.cli import output
from stepgguf.cli.destinations import Destination
from stepgguf.cli.progress import ProgressMeter, layer_name
from stepgguf.convert import pipeline
from stepgguf.convert.fold import FoldedLine, fold_tensors
from stepgguf.convert.plan import Plan
from stepgguf.convert.sources.kept_folder import KeptFolder
from stepgguf.convert.sources.source import TensorSource
from stepgguf.convert.writer import Writer
from stepgguf.files.byte_sizes import readable_size

if TYPE_CHECKING:
    from stepgguf.cli.calibrating import CalibrationRun


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How a plan is carried out. threads None: all cores; memory None: the pipeline's default.

    costs: file of what types cost, for a budget. kept: where files of the Hub are kept as they are read.
    """

    threads: int | None = None
    memory: int | None = None
    dry_run: bool = False
    restart: bool = False
    overwrite: bool = False
    quiet: bool = False
    json: bool = False
    costs: Path | None = None
    kept: KeptFolder | None = None


def carry_out(
    plan: Plan, source: TensorSource, dest: Destination, how: RunOptions, calibration: CalibrationRun | None = None
) -> None:
    """Show the plan (--dry-run), or make its files and say what to do with them."""
    conversion = Conversion(plan, source, how, calibration)
    if how.dry_run:
        conversion.show_plan()
        return
    dest.make_folder()
    conversion.execute()
    if not (how.quiet or how.json):
        output.note(f"next: stepgguf chat {shlex.quote(str(plan.files[0].path))}")


class Conversion:
    """A plan with its source: shown, or carried out."""

    def __init__(
        self, plan: Plan, source: TensorSource, how: RunOptions, calibration: CalibrationRun | None = None
    ) -> None:
        self.plan, self.source, self.how, self.calibration = plan, source, how, calibration
        output.warn(plan.warnings)

    def plan_text(self) -> str:
        """The plan as plain text, a line for each fold of tensors."""
        return "\n".join(text.plain for text in self._table())

    def show_plan(self) -> None:
        """Print the plan: what --dry-run does."""
        if self.how.json:
            output.print_json(
                self._report()
                | {"plan": [output.line_report(line) | {"reason": line.reason} for line in self._lines()]}
            )
            return
        output.print_texts(self._table())
        if not self.how.quiet:
            output.note(f"nothing is written; without --dry-run it becomes {self.plan.files[0].path}")

    def execute(self) -> None:
        """Make the files and say what was made. Ctrl+C commits what is done and exits with 130."""
        started = time.monotonic()
        how = self.how
        if how.kept is not None:
            how.kept.refuse_names([file.path for file in self.plan.files])
        with Writer(
            self.plan,
            self.source.identity(),
            restart=how.restart,
            overwrite=how.overwrite,
            working_bytes=self._working_bytes(),
        ) as writer:
            resumed = len(writer.finished)
            if resumed and not how.quiet:
                output.note(f"resuming: {resumed} of {len(writer.units)} units are done")
            if self.calibration is not None:
                self.calibration.make_units(writer)
            meter = self._write(writer)
        seconds = time.monotonic() - started
        if how.json:
            made = {"seconds": round(seconds, 3), "peak_rss_bytes": peak_rss(), "resumed_units": resumed}
            output.print_json(self._report() | made)
        elif not how.quiet:
            self._say_what_was_made(meter, seconds)

    def _working_bytes(self) -> int:
        """What calibrating and keeping will take of the disk that the output is on."""
        kept, folder = self.how.kept, self.plan.files[0].path.parent
        return (0 if self.calibration is None else self.calibration.missing_bytes) + (
            0 if kept is None else kept.missing_bytes_on(folder)
        )

    def _write(self, writer: Writer) -> ProgressMeter:
        """Run the pipeline under a progress meter; what the meter counted is for the summary."""
        layers: dict[str, int] = {}
        for tensor in self.plan.tensors:
            layer = layer_name(tensor.name)
            layers[layer] = layers.get(layer, 0) + tensor.n_bytes
        try:
            with ProgressMeter(self.plan.type_name, self.plan.n_bytes, quiet=self.how.quiet, layers=layers) as meter:
                pipeline.make_units(
                    self.source,
                    writer,
                    progress=meter.add_unit,
                    compiling=meter.note_compiling,
                    threads=self.how.threads,
                    memory=self.how.memory or pipeline.DEFAULT_MEMORY,
                )
            if self.how.kept is not None:
                self._complete(self.how.kept)  # first: what is made of damaged bytes shall not get its name
            writer.finish()
        except KeyboardInterrupt:
            share = meter.bytes_done / self.plan.n_bytes
            output.note(f"interrupted at {share:.0%}; repeat the command to go on from there")
            raise typer.Exit(130) from None
        return meter

    def _complete(self, kept: KeptFolder) -> None:
        with ProgressMeter(f"checking {kept.path}", kept.unchecked_bytes, quiet=self.how.quiet) as meter:
            kept.complete(meter.add_bytes)
        if not (self.how.quiet or self.how.json):
            files = output.counted(kept.n_files, "file")
            output.note(f"kept {files} in {kept.path} ({readable_size(kept.n_bytes)}), each as the Hub lists it")

    def _say_what_was_made(self, meter: ProgressMeter, seconds: float) -> None:
        for file in self.plan.files:
            output.note(f"wrote {file.path} ({readable_size(file.size)})")
        compiled = f" (and {meter.compile_seconds:.1f} s of compiling)" if meter.compile_seconds else ""
        working = seconds - meter.compile_seconds
        rate = (self.plan.n_bytes - meter.bytes_resumed) / working / 1e6
        output.note(
            f"{self.plan.bpw:.3f} bpw, {working:.1f} s{compiled}, {rate:.0f} MB/s out, "
            f"peak memory {readable_size(peak_rss())}"
        )
        for line in self._prediction():
            output.note(line)

    def _prediction(self) -> list[str]:
        """A line that says what is expected of types chosen by gradients; none of others."""
        predicted = self.plan.predicted_kld
        if predicted is None:
            return []
        codes = "" if self.calibration is None else "; calibrated codes should have less"
        return [
            f"predicted KL divergence {predicted:.4f} nats a token with stock codes{codes} (stepgguf eval measures it)"
        ]

    def _lines(self) -> list[FoldedLine]:
        return fold_tensors((t.name, t.ggml_type.name, t.n_bytes, t.n_values, t.reason) for t in self.plan.tensors)

    def _table(self) -> list[Text]:
        plan = self.plan
        files = output.counted(len(plan.files), "file")
        total = (
            f"{len(plan.tensors)} tensors in {files}, {readable_size(plan.n_bytes)} ({plan.n_bytes / 1e9:.2f} GB), "
            f"{plan.bpw:.3f} bpw"
        )
        return [*output.tensor_table(self._lines()), Text(total, "bold"), *map(Text, self._prediction())]

    def _report(self) -> dict[str, Any]:
        calibration = {} if self.calibration is None else {"calibration": self.calibration.report()}
        return calibration | {
            "type": self.plan.type_name,
            "files": [{"path": str(file.path), "bytes": file.size} for file in self.plan.files],
            "tensors": len(self.plan.tensors),
            "tensor_bytes": self.plan.n_bytes,
            "bpw": round(self.plan.bpw, 4),
            "predicted_kld": self.plan.predicted_kld,
            "warnings": list(self.plan.warnings),
        }


def peak_rss() -> int:
    """The most memory this process has held, in bytes.

    Linux counts what the parent held before exec in ru_maxrss, so its own figure is read there; elsewhere (macOS)
    ru_maxrss is right, and in bytes.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
