"""Carrying out a plan in the terminal: what convert, quantize and demo share."""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path
from typing import Any

import typer

from stepgguf.cli import output
from stepgguf.convert import budget, measure, pipeline
from stepgguf.convert.budget import Limits, Trunk
from stepgguf.convert.checkpoint import Checkpoint
from stepgguf.convert.fold import Line, fold
from stepgguf.convert.ggufsource import GGUFSource
from stepgguf.convert.plan import Options, Plan
from stepgguf.convert.planner import plan_source
from stepgguf.convert.sizes import inventory
from stepgguf.convert.source import TensorSource
from stepgguf.convert.writer import Writer


def planned(
    source: Checkpoint | GGUFSource,
    dest: Path,
    options: Options,
    limits: Limits | None,
    *,
    threads: int | None,
    quiet: bool,
) -> Plan:
    """The plan; within a budget after measuring what each type loses."""
    if limits is None:
        return plan_source(source, dest, options)
    return budget.plan_within(
        limits, source, dest, options, priced(source, dest, options, threads=threads, quiet=quiet)
    )


def priced(
    source: Checkpoint | GGUFSource, dest: Path, options: Options, *, threads: int | None, quiet: bool = False
) -> Trunk:
    """What each type costs each tensor. Ctrl+C keeps what is measured and exits with 130."""
    total = sum(measure.sampled(tensor.shape) for tensor in inventory(source).matrices)
    try:
        with output.Meter("measuring", 2 * total, quiet=quiet) as meter:
            return budget.price(
                source,
                dest,
                options,
                threads=threads,
                progress=lambda tensor: meter.step(2 * measure.sampled(tensor.shape)),  # as BF16
                compiling=meter.compiling,
            )
    except KeyboardInterrupt:
        output.note("interrupted while measuring; repeat the command to go on from there")
        raise typer.Exit(130) from None


class Run:
    """A plan, its source and how to show them."""

    def __init__(self, plan: Plan, source: TensorSource, *, quiet: bool = False, json: bool = False) -> None:
        self.plan, self.source, self.quiet, self.json = plan, source, quiet, json
        output.warn(plan.warnings)

    def lines(self) -> list[Line]:
        return fold((t.name, t.ggml_type.name, t.n_bytes, t.n_values, t.reason) for t in self.plan.tensors)

    def plan_text(self) -> str:
        total = (
            f"{len(self.plan.tensors)} tensors in {len(self.plan.files)} file{'s' * (len(self.plan.files) > 1)}, "
            f"{self.plan.n_bytes / 2**30:.2f} GiB ({self.plan.n_bytes / 1e9:.2f} GB), {self.plan.bpw:.3f} bpw"
        )
        return f"{output.table(self.lines())}\n{total}"

    def show_plan(self) -> None:
        """--dry-run."""
        if self.json:
            output.data(self._report() | {"plan": [_line(line) for line in self.lines()]})
        else:
            sys.stdout.write(self.plan_text() + "\n")

    def execute(self, *, restart: bool, overwrite: bool, threads: int | None, memory: int) -> None:
        """Make the files. Ctrl+C commits what is done and exits with 130."""
        started = time.monotonic()
        with Writer(self.plan, self.source.identity(), restart=restart, overwrite=overwrite) as writer:
            self._run(writer, started, threads, memory)

    def _run(self, writer: Writer, started: float, threads: int | None, memory: int) -> None:
        resumed = len(writer.finished)
        if resumed and not self.quiet:
            output.note(f"resuming: {resumed} of {len(writer.units)} units are done")
        layers: dict[str, int] = {}
        for tensor in self.plan.tensors:
            layer = output.layer_name(tensor.name)
            layers[layer] = layers.get(layer, 0) + tensor.n_bytes
        try:
            with output.Meter(self.plan.type_name, self.plan.n_bytes, quiet=self.quiet, layers=layers) as meter:
                pipeline.run(
                    self.source, writer, progress=meter.unit, compiling=meter.compiling, threads=threads, memory=memory
                )
        except KeyboardInterrupt:
            share = meter.done / self.plan.n_bytes
            output.note(f"interrupted at {share:.0%}; repeat the command to go on from there")
            raise typer.Exit(130) from None
        seconds = time.monotonic() - started
        if self.json:
            output.data(
                self._report() | {"seconds": round(seconds, 3), "peak_rss_bytes": peak_rss(), "resumed_units": resumed}
            )
        elif not self.quiet:
            for file in self.plan.files:
                output.note(f"wrote {file.path} ({file.size / 2**30:.2f} GiB)")
            rate = (self.plan.n_bytes - meter.resumed) / seconds / 1e6
            output.note(
                f"{self.plan.bpw:.3f} bpw, {seconds:.1f} s, {rate:.0f} MB/s out, peak memory {output.size(peak_rss())}"
            )

    def _report(self) -> dict[str, Any]:
        return {
            "type": self.plan.type_name,
            "files": [{"path": str(file.path), "bytes": file.size} for file in self.plan.files],
            "tensors": len(self.plan.tensors),
            "tensor_bytes": self.plan.n_bytes,
            "bpw": round(self.plan.bpw, 4),
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


def _line(line: Line) -> dict[str, Any]:
    return {
        "layers": line.layers, "role": line.role, "count": line.count, "type": line.type, "bytes": line.n_bytes,
        "reason": line.reason,
    }  # fmt: skip
