"""Carrying out a plan in the terminal: what convert, quantize and demo share."""

from __future__ import annotations

import resource
import shlex
import time
from pathlib import Path
from typing import Any

import typer
from rich.text import Text

from stepgguf.cli import output
from stepgguf.convert import budget, pipeline
from stepgguf.convert.budget import Limits, Trunk
from stepgguf.convert.fold import Line, fold
from stepgguf.convert.measure import count_sampled_values
from stepgguf.convert.plan import Options, Plan
from stepgguf.convert.planner import plan_source
from stepgguf.convert.sizes import Inventory, inventory
from stepgguf.convert.sources.opening import open_source
from stepgguf.convert.sources.source import TensorSource
from stepgguf.convert.writer import Writer, is_taken, name_taken
from stepgguf.errors import StepggufError, UnknownType
from stepgguf.quants.recipe import Recipe


def planned(
    source: TensorSource,
    dest: Path,
    options: Options,
    limits: Limits | None,
    *,
    threads: int | None,
    quiet: bool,
    must_be_free: bool,
) -> Plan:
    """The plan; within a budget after measuring what each type loses, if there is a choice.

    must_be_free: a destination that is taken is refused before anything is measured.
    """
    if limits is None:
        return plan_source(source, dest, options)
    plan = budget.settled(limits, source, dest, options)
    if plan is not None:
        return plan
    if must_be_free and is_taken(dest):
        raise name_taken(dest)
    trunk = priced(source, dest, options, threads=threads, quiet=quiet)
    return budget.plan_within(limits, source, dest, options, trunk)


def chosen(type_name: str | None, limits: Limits | None, source: Path, default: str) -> tuple[Recipe, Limits | None]:
    """The recipe and the budget. For a type that there is not, the error says what those that come near would take."""
    try:
        return budget.resolve(type_name, limits, default)
    except UnknownType as error:
        try:
            with open_source(source) as opened:
                raise sized(error, inventory(opened)) from None
        except StepggufError as other:
            raise other if isinstance(other, UnknownType) else error from None  # one thing at a time


def sized(error: UnknownType, model: Inventory) -> UnknownType:
    """The same with the sizes that the types which come near give this model."""
    if not error.near:
        return error
    sizes = sorted(((model.sizes(name), name) for name in error.near), key=lambda pair: pair[0].total)
    found = [f"{name} {output.size(s.total)}{' (with an imatrix)' * s.needs_imatrix}" for s, name in sizes]
    return UnknownType(error.message, hint=f"Types that come near: {', '.join(found)}.", near=error.near)


def priced(source: TensorSource, dest: Path, options: Options, *, threads: int | None, quiet: bool = False) -> Trunk:
    """What each type costs each tensor. Ctrl+C keeps what is measured and exits with 130."""
    total = sum(count_sampled_values(tensor.shape) for tensor in inventory(source).matrices)
    try:
        with output.Meter("measuring", 2 * total, quiet=quiet) as meter:
            return budget.price(
                source,
                dest,
                options,
                threads=threads,
                # As BF16, whatever they are stored as.
                progress=lambda tensor, kept: meter.step(2 * count_sampled_values(tensor.shape), earlier=kept),
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
        return "\n".join(text.plain for text in self._table())

    def show_plan(self) -> None:
        """--dry-run."""
        if self.json:
            output.data(self._report() | {"plan": [_line(line) for line in self.lines()]})
            return
        output.show(self._table())
        if not self.quiet:
            output.note(f"nothing is written; without --dry-run it becomes {self.plan.files[0].path}")

    def _table(self) -> list[Text]:
        plan = self.plan
        files = f"{len(plan.files)} file{'s' * (len(plan.files) > 1)}"
        total = (
            f"{len(plan.tensors)} tensors in {files}, {output.size(plan.n_bytes)} ({plan.n_bytes / 1e9:.2f} GB), "
            f"{plan.bpw:.3f} bpw"
        )
        return [*output.columns(self.lines()), Text(total, "bold")]

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
                pipeline.make_files(
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
                output.note(f"wrote {file.path} ({output.size(file.size)})")
            compiled = f" (and {meter.compile_seconds:.1f} s of compiling)" if meter.compile_seconds else ""
            working = seconds - meter.compile_seconds
            rate = (self.plan.n_bytes - meter.resumed) / working / 1e6
            output.note(
                f"{self.plan.bpw:.3f} bpw, {working:.1f} s{compiled}, {rate:.0f} MB/s out, "
                f"peak memory {output.size(peak_rss())}"
            )

    def say_next(self) -> None:
        """What to do with the file."""
        if not (self.quiet or self.json):
            output.note(f"next: stepgguf chat {shlex.quote(str(self.plan.files[0].path))}")

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
