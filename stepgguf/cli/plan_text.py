"""A plan for a machine as the terminal shows it: what all rows share stands above the table, what it rests on below."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from rich.text import Text

from stepgguf.cli.output import counted
from stepgguf.convert.sources.hub import hub_address
from stepgguf.files.byte_sizes import GIB, MIB, readable_size
from stepgguf.fit.catalogue import PublishedSpeed
from stepgguf.fit.memory import ContextParams, memory_need, saved_state_bytes
from stepgguf.fit.placement import PlacedModel
from stepgguf.fit.planning import OWN_TYPES, GenerationSpeed, MachinePlan, PlanRow, TargetMachine
from stepgguf.fit.speed import ACCEPTED, DRAFTED, SOURCE_ERROR


def budget_lines(result: MachinePlan) -> Iterator[str]:
    """From the machine's memory to what is left for weights, line by line."""
    model, context, target, needed = result.footprint, result.context, result.target, result.need
    full = tuple(layer for layer in model.trunk_layers if not layer.is_sliding)
    n_sliding, n_mtp = len(model.trunk_layers) - len(full), len(model.mtp_layers)
    full_kv, saved_state = (
        memory_need(replace(model, layers=full), context).kv,
        saved_state_bytes(model, context.attention),
    )
    requests = counted(context.n_parallel, "request")
    each = f", on each of {len(target.devices)}" * (len(target.devices) > 1)
    parts = [
        (full_kv, f"KV cache of {len(full)} full layers, by context"),
        (needed.kv - full_kv, f"KV cache of {n_sliding} sliding layers, by their window of {model.sliding_window}"),
        (needed.mtp, f"MTP: cache and buffers of {n_mtp} blocks"),
        (needed.compute, f"buffers (estimate){each}"),
        (needed.cache, f"kept conversations, with {needed.cache // saved_state} saved states of "
                       f"{readable_size(saved_state)} at most"),
        (result.unusable, "what whole layers leave free, and a matrix on its way (estimate)" if target.has_cards
                          else "what whole layers leave free (estimate)"),
    ]  # fmt: skip
    yield f"on {target.title}, {context.n_ctx:,} tokens of context, {requests} at a time"
    yield ""
    yield from _capacity_lines(target, context)
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
    address = hub_address(source)
    if row.type == OWN_TYPES and address is not None:
        return address.download_command
    if row.type == OWN_TYPES:
        return (
            f"stepgguf {_run_words(result.target, row)} {path} --ctx {result.context.n_ctx}{' --draft 0' * drops_mtp}"
        )
    choice = row.type.replace("fit ", "--fit ") if row.type.startswith("fit ") else f"--type {shlex.quote(row.type)}"
    weighted = " --imatrix FILE" * row.needs_imatrix
    if any(row.type == OWN_TYPES for row in result.rows):  # a GGUF: quantize keeps what its source has
        remark = "  # keeps the MTP blocks, which this plan leaves out"
        return f"stepgguf quantize {path} models/ {choice}{weighted}{remark * drops_mtp}"
    return f"stepgguf convert {path} models/ {choice}{weighted}{' --mtp drop' * drops_mtp}"


def _run_words(target: TargetMachine, row: PlanRow) -> str:
    """The command that runs a file. chat places it on cards itself; other machines need a llama-server."""
    has_nodes = row.placed is not None and not target.has_cards
    return "serve --engine llama-server --rpc HOST:50052" if has_nodes else "chat"


def row_table(result: MachinePlan) -> Iterator[Text]:
    """A line for each row, after the heads of the columns: the best stands out, what does not fit is dim."""
    rows, best, target = result.rows, result.best, result.target
    is_measured, has_cards = any(row.loss is not None for row in rows), target.has_cards
    places = ("cards", "RAM", "cpu-moe") if has_cards else ("total", "fits")
    read = () if has_cards else ("GB/token",)
    heads = ("type", "GiB", "bpw", *places, "longest", *read, "tok/s", "full", "loss" if is_measured else "MTP")
    cells = [
        (
            row.type + "*" * row.needs_imatrix,
            f"{row.weights / GIB:.1f}",
            f"{row.bpw:.2f}",
            *(_place_cells(row.placed) if has_cards else (f"{row.total / GIB:.1f}", "yes" if row.fits else "no")),
            f"{row.n_ctx:,}" if row.n_ctx else "-",
            *(() if has_cards else (f"{row.empty.read / 1e9:.2f}",)),
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


def _place_cells(placed: PlacedModel | None) -> tuple[str, str, str]:
    if placed is None:
        return "-", "-", "no"
    return f"{sum(placed.cards) / GIB:.1f}", f"{placed.ram / GIB:.1f}", str(placed.n_cpu_moe)


def closing_notes(result: MachinePlan) -> Iterator[str]:
    """What to take, and what the figures rest on, line by line."""
    what = "least predicted loss" if result.best and result.best.loss is not None else "largest"
    yield f"The {what} that fits is {result.best.type}." if result.best else "None of these fits."
    if result.best is not None and result.best.placed is not None:
        yield from _server_lines(result.target, result.best.placed, result.context)
    if any(row.needs_imatrix for row in result.rows):
        yield "* needs an importance matrix."
    if any(row.mtp_gain for row in result.rows):
        share = " to ".join(f"{share:.0%}" for share in ACCEPTED)
        yield f"MTP: {DRAFTED} drafted tokens, of which {share} are accepted (llama.cpp #24340)."
    yield from _speed_notes(result.target)


def _server_lines(target: TargetMachine, placed: PlacedModel, context: ContextParams) -> Iterator[str]:
    """The command with which llama-server places a model so."""
    options = f"-c {context.n_ctx} -ngl 999 --cache-ram {context.cache_ram // MIB}"
    if context.n_parallel > 1:
        options += f" -np {context.n_parallel} --kv-unified"
    places = [f"--n-cpu-moe {placed.n_cpu_moe}"] if placed.n_cpu_moe else []
    if len(placed.counts) > 1:
        places.append(f"--tensor-split {','.join(map(str, placed.counts))}")
    if target.has_cards:
        yield "chat and serve place it so themselves, by what is free then. llama.cpp's server:"
    else:
        yield "llama.cpp places it so:"
    yield f"  llama-server -m FILE {options}" + " \\" * bool(places)
    if places:
        yield f"    {' '.join(places)}"


def _speed_notes(target: TargetMachine) -> Iterator[str]:
    """What the speeds are made of: bandwidth, and the published speeds with their sources."""
    listed = target.listed
    if listed is None:
        yield "tok/s is unknown: how fast this machine reads memory is not in the list."
        yield "Where --ram and --gpu describe a box, --bandwidth gives a ceiling."
        return
    if not listed.measured:
        yield "tok/s is a ceiling, by bandwidth and bytes read a token, and is not reached:"
        yield "no measurement of this model is published for such a machine."
        if target.has_cards and listed.card_bandwidth is None:
            yield "What the cards read is not counted in it."
    else:
        yield "tok/s is an estimate: bandwidth / bytes read a token x efficiency, in the range"
        yield f"of what was published for this chip, at least {SOURCE_ERROR:.0%} about its median, which is"
        yield "the error from one source to another. Without MTP:"
    yield f"  {listed.bandwidth / 1e9:>10g} GB/s   {listed.bandwidth_source}"
    if listed.card_bandwidth is not None:
        yield f"  {listed.card_bandwidth / 1e9:>10g} GB/s   {listed.card_bandwidth_source}"
    for (file, source), run in groupby(listed.measured, lambda m: (m.file, m.source)):
        yield from _run_lines(file, source, list(run), listed.bandwidth)
    if listed.setup:
        yield f"Setup: {listed.setup}"


def _run_lines(file: str, source: str, run: Sequence[PublishedSpeed], bandwidth: float) -> Iterator[str]:
    """A published run: its speeds, efficiencies and contexts."""
    first, last = run[0], run[-1]
    speeds = f"{first.tps:g}" if first is last else f"{first.tps:g}-{last.tps:g}"
    shares = [100 * m.efficiency(bandwidth) for m in run]
    contexts = f"{first.depth:,} to {last.depth:,} tokens" if first is not last else f"{first.depth:,} tokens"
    yield f"  {speeds:>10} tok/s  {_range_text(min(shares), max(shares))}%: {file}"
    yield f"{'':13}{contexts if last.depth else 'empty context'}; {source}"


def _capacity_lines(target: TargetMachine, context: ContextParams) -> Iterator[str]:
    """What there is for the model, place by place."""
    have, reserve = target.machine.ram, readable_size(target.budget.reserve)
    if target.has_cards:
        where = f"on {counted(len(target.devices), 'card')}, {reserve} of each left free"
        yield f"  {_gib_column(sum(target.devices))}  {where}"
        systems = readable_size(have - target.ram)
        yield f"+ {_gib_column(target.ram)}  in RAM: of {readable_size(have)}, {systems} are the system's"
        return
    capacity = _gib_column(target.capacity(context))
    if target.devices:
        yield f"  {capacity}  for the model: {readable_size(target.devices[0])} on each of {len(target.devices)}"
    elif target.budget.limit < target.budget.ceiling:
        yield f"  {capacity}  for the model: {readable_size(target.budget.limit)} that the GPU may have, and other RAM"
    else:
        yield f"  {capacity}  for the model: of {readable_size(have)}, {reserve} are the system's"


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
