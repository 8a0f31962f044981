"""A plan for a machine as the terminal shows it: what all rows share stands above the table, what it rests on below."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from rich.text import Text

from stepgguf.cli.output import counted
from stepgguf.convert.sources.opening import is_gguf
from stepgguf.files.byte_sizes import GIB, MIB, readable_size
from stepgguf.fit.catalogue import ListedMachine
from stepgguf.fit.memory import memory_need, saved_state_bytes
from stepgguf.fit.planning import OWN_TYPES, GenerationSpeed, MachinePlan, PlanRow, TargetMachine
from stepgguf.fit.speed import ACCEPTED, DRAFTED


def budget_lines(result: MachinePlan) -> Iterator[str]:
    """From the machine's memory to what is left for weights, line by line."""
    model, context, target, needed = result.footprint, result.context, result.target, result.need
    full = tuple(layer for layer in model.trunk_layers if not layer.is_sliding)
    n_sliding, n_mtp = len(model.trunk_layers) - len(full), len(model.mtp_layers)
    full_kv, saved_state = memory_need(replace(model, layers=full), context).kv, saved_state_bytes(model)
    requests = counted(context.n_parallel, "request")
    parts = [
        (full_kv, f"KV cache of {len(full)} full layers, by context"),
        (needed.kv - full_kv, f"KV cache of {n_sliding} sliding layers, by their window of {model.sliding_window}"),
        (needed.mtp, f"MTP: cache and buffers of {n_mtp} blocks"),
        (needed.compute, "buffers (estimate)"),
        (needed.cache, f"kept conversations, with {needed.cache // saved_state} saved states of "
                       f"{readable_size(saved_state)} at most"),
    ]  # fmt: skip
    yield f"on {target.title}, {context.n_ctx:,} tokens of context, {requests} at a time"
    yield ""
    yield f"  {_gib_column(target.capacity(context))}  {_capacity_text(target)}"
    yield from (f"- {_gib_column(n_bytes)}  {text}" for n_bytes, text in parts if n_bytes)
    yield f"= {_gib_column(result.room)}  for weights: {_suggest_budget(result)}"


def _suggest_budget(result: MachinePlan) -> str:
    """What to do with the room: a budget that can be had, or why there is none."""
    plain, weighted = result.smallest
    if result.room <= 0:
        return "not even the context fits"
    if result.room < weighted:
        return f"the smallest types take {readable_size(weighted)}"
    unit, name = (GIB, "GiB") if result.room >= GIB else (MIB, "MiB")
    text = f"convert --fit {result.room * 10 // unit / 10:.1f}{name}"
    return text if result.room >= plain else f"{text} --imatrix FILE"


def next_command(source: Path, result: MachinePlan, row: PlanRow) -> str:
    """The command that makes the row's file, or uses the one that is there."""
    path, drops_mtp = shlex.quote(str(source)), result.footprint.has_mtp and not result.context.mtp
    if row.type == OWN_TYPES:
        return f"stepgguf chat {path} --ctx {result.context.n_ctx}{' --draft 0' * drops_mtp}"
    choice = row.type.replace("fit ", "--fit ") if row.type.startswith("fit ") else f"--type {shlex.quote(row.type)}"
    weighted = " --imatrix FILE" * row.needs_imatrix
    if is_gguf(source):  # quantize keeps what its source has
        remark = "  # keeps the MTP blocks, which this plan leaves out"
        return f"stepgguf quantize {path} models/ {choice}{weighted}{remark * drops_mtp}"
    return f"stepgguf convert {path} models/ {choice}{weighted}{' --mtp drop' * drops_mtp}"


def row_table(rows: Sequence[PlanRow], best: PlanRow | None) -> Iterator[Text]:
    """A line for each row, after the heads of the columns: the best stands out, what does not fit is dim."""
    is_measured = any(row.loss is not None for row in rows)
    last = "loss" if is_measured else "MTP"
    heads = ("type", "GiB", "bpw", "total", "fits", "longest", "GB/token", "tok/s", "full", last)
    cells = [
        (
            row.type + "*" * row.needs_imatrix,
            f"{row.weights / GIB:.1f}",
            f"{row.bpw:.2f}",
            f"{row.total / GIB:.1f}",
            "yes" if row.fits else "no",
            f"{row.n_ctx:,}" if row.n_ctx else "-",
            f"{row.empty.read / 1e9:.2f}",
            _tps_text(row.empty),
            _tps_text(row.full),
            _loss_text(row.loss) if is_measured else f"x{_range_text(*row.mtp_gain, 1)}" if row.mtp_gain else "-",
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
    styles = ["bold", *("bold green" if row is best else "" if row.fits else "dim" for row in rows)]
    for line, style in zip((heads, *cells), styles, strict=True):
        others = "".join(f"  {cell:>{w}}" for cell, w in zip(line[1:], widths[1:], strict=True))
        yield Text(f"{line[0]:<{widths[0]}}{others}", style)


def closing_notes(result: MachinePlan) -> Iterator[str]:
    """What to take, and what the figures rest on, line by line."""
    what = "least predicted loss" if result.best and result.best.loss is not None else "largest"
    yield f"The {what} that fits is {result.best.type}." if result.best else "None of these fits."
    if any(row.needs_imatrix for row in result.rows):
        yield "* needs an importance matrix."
    if any(row.mtp_gain for row in result.rows):
        share = " to ".join(f"{share:.0%}" for share in ACCEPTED)
        yield f"MTP: {DRAFTED} drafted tokens, of which {share} are accepted (llama.cpp #24340)."
    yield from _speed_notes(result.target.listed)


def _speed_notes(listed: ListedMachine | None) -> Iterator[str]:
    """What the speeds are made of: bandwidth, and the published speeds with their sources."""
    if listed is None:
        yield "tok/s is unknown: how fast this machine reads memory is not in the list."
        return
    if not listed.measured:
        yield "tok/s is a ceiling, bandwidth / bytes read a token, and is not reached:"
        yield "no measurement of this model is published for this chip."
    else:
        yield "tok/s is an estimate: bandwidth / bytes read a token x efficiency, which is from"
        yield f"{counted(len(listed.measured), 'published measurement')} of this model on this chip, without MTP:"
    yield f"  {listed.bandwidth / 1e9:>4g} GB/s   {listed.bandwidth_source}"
    for m in listed.measured:
        yield f"  {m.tps:>4g} tok/s  {m.tps * m.read / listed.bandwidth:.0%}: {m.file}"
        yield f"{'':14}{m.source}"
    yield f"Setup: {listed.setup}"


def _capacity_text(target: TargetMachine) -> str:
    if target.machine.kind == "gpu":
        return f"for the model, in GPUs ({readable_size(target.budget.limit)}) and RAM"
    if target.budget.limit < target.budget.ceiling:
        return f"for the model: {readable_size(target.budget.limit)} that the GPU may have, and other RAM"
    ram, reserve = readable_size(target.machine.ram), readable_size(target.budget.reserve)
    return f"for the model: of {ram}, {reserve} are the system's"


def _tps_text(speed: GenerationSpeed) -> str:
    """ "21-32" tok/s, "<42" where only the ceiling is known, "-" where nothing is."""
    if speed.tps is not None:
        return _range_text(*speed.tps)
    return "-" if speed.ceiling_tps is None else f"<{speed.ceiling_tps:.0f}"


def _loss_text(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.3g}" if loss < 1 else f"{loss:.2f}"


def _range_text(low: float, high: float, digits: int = 0) -> str:
    texts = f"{low:.{digits}f}", f"{high:.{digits}f}"
    return texts[0] if texts[0] == texts[1] else "-".join(texts)


def _gib_column(n_bytes: int) -> str:
    return f"{n_bytes / GIB:7.2f} GiB"
