"""stepgguf plan: what fits a machine, and how fast it would be there. What all rows share is said above the table."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from stepgguf.cli import arguments
from stepgguf.files.byte_sizes import readable_size
from stepgguf.runtime.engine import DEFAULT_CTX

if TYPE_CHECKING:
    from stepgguf.cli.planning import Pace, Place, Planned, Row
    from stepgguf.fit.catalogue import Listed


def plan(
    source: Annotated[
        Path,
        typer.Argument(metavar="SRC", help="A checkpoint directory, or a GGUF (of a split one, any of its files)."),
    ],
    machine: Annotated[
        str,
        typer.Option(
            "--machine",
            "-m",
            metavar="NAME",
            help="spark, strix-128, mac-128, ... (a wrong name lists them); auto is this one.",
        ),
    ] = "auto",
    ctx: Annotated[
        int, typer.Option(min=64, max=2**24, help="Context in tokens, for all requests together.")
    ] = DEFAULT_CTX,
    parallel: Annotated[int, typer.Option(min=1, max=4096, help="Requests at the same time.")] = 1,
    mtp: Annotated[str, typer.Option(metavar="include|drop", help="With the MTP blocks or without.")] = "include",
    types: Annotated[
        str | None,
        typer.Option(metavar="T,T", help="Stock types, recipes and .toml files. Default: a range, and all recipes."),
    ] = None,
    measure: Annotated[
        bool,
        typer.Option("--measure", help="Measure on a sample of the weights what types lose, and add what --fit takes."),
    ] = False,
    imatrix: arguments.ImatrixFile = None,
    imatrix_prior: arguments.ImatrixPrior = "pooled",
    threads: arguments.Threads = None,
    json: arguments.Json = False,
) -> None:
    """Show what fits a machine and how fast it would be there: a row for each type and recipe.

    - **GiB, bpw**: the file, MTP blocks included, and its bits per weight
    - **total**: GiB with everything else: KV cache, MTP, buffers, kept conversations
    - **longest**: the longest context with which it fits; "-" if none does
    - **GB/token**: weights that one token reads: all dense ones, but 8 of 288 experts
    - **tok/s, full**: predicted for one request without MTP, with an empty and with a full context
    - **MTP**: how many times as fast it is with two drafted tokens, at an empty context, by published acceptance
    - **loss**, with --measure: what --fit minimises, the predicted error of what the layers add; no KLD, but it orders

    No weights are read without --measure; with it a sample, once: what was measured is kept. Speeds are estimates from
    the bytes that are read; what they rest on is printed below the table.

    Examples:

    - `stepgguf plan Step-3.5-Flash/ --machine spark --ctx 131072`
    - `stepgguf plan Step-3.5-Flash/ --machine mac-128 --types Q4_K_S,IQ4_XS,mine.toml`
    - `stepgguf plan Step-3.5-Flash/ --machine strix-128 --measure --imatrix imatrix.gguf`
    - `stepgguf plan step-q4_k_s.gguf --machine strix-128 --parallel 4 --json`
    """
    from stepgguf.cli import output
    from stepgguf.cli.converting import priced
    from stepgguf.cli.planning import place, planned
    from stepgguf.convert.budget import Limits, resolve
    from stepgguf.convert.plan import Options
    from stepgguf.fit.memory import Context

    if mtp not in ("include", "drop"):
        raise typer.BadParameter(f"{mtp!r} is not one of include, drop", param_hint="--mtp")
    names = None if types is None else [name.strip() for name in types.split(",") if name.strip()]
    if names == []:
        raise typer.BadParameter(f"{types!r} names no type", param_hint="--types")
    if imatrix is not None and not measure:
        raise typer.BadParameter("--imatrix is for --measure", param_hint="--imatrix")
    options = Options(
        resolve(None, Limits(1), "")[0], mtp, importance=arguments.read_importance(imatrix, imatrix_prior)
    )
    context = Context(ctx, parallel, mtp=mtp == "include")
    pricing = (lambda opened: priced(opened, Path("plan.gguf"), options, threads=threads)) if measure else None
    result = planned(source, place(machine), context, names, pricing)
    if ctx > result.footprint.n_ctx_train:
        output.warn([f"{ctx:,} tokens are more than the {result.footprint.n_ctx_train:,} it was trained for"])
    if json:
        output.data(report(result))
    else:
        output.lines([*budget(result), ""])
        output.show(table(result.rows, result.best))
        output.lines(["", *notes(result)])
        if result.best is not None:
            output.note(f"next: {command(result, result.best)}")


def report(result: Planned) -> dict[str, Any]:
    """As data; sizes in bytes, speeds in tok/s and bytes per second."""
    place, context = result.place, result.context
    return {
        "machine": {
            "title": place.title,
            "ram": place.machine.ram,
            "capacity": place.capacity(context),
            "bandwidth": place.listed and place.listed.bandwidth,
            "measured": [asdict(m) for m in place.listed.measured] if place.listed else [],
        },
        "context": asdict(context),
        "need": asdict(result.need),
        "room": result.room,
        "rows": [asdict(row) for row in result.rows],
    }


def budget(result: Planned) -> Iterator[str]:
    """From the machine's memory to what is left for weights, line by line."""
    from stepgguf.fit.memory import checkpoint, need

    model, context, place, needed = result.footprint, result.context, result.place, result.need
    full = [layer for layer in model.layers if not layer.is_sliding and not layer.is_mtp]
    sliding = [layer for layer in model.layers if layer.is_sliding and not layer.is_mtp]
    full_kv = need(replace(model, layers=tuple(full)), context).kv
    requests = "1 request" if context.n_parallel == 1 else f"{context.n_parallel} requests"
    n_mtp = len(model.layers) - len(full) - len(sliding)
    parts = [
        (full_kv, f"KV cache of {len(full)} full layers, by context"),
        (needed.kv - full_kv, f"KV cache of {len(sliding)} sliding layers, by their window of {model.window}"),
        (needed.mtp, f"MTP: cache and buffers of {n_mtp} blocks"),
        (needed.compute, "buffers (estimate)"),
        (needed.cache, f"kept conversations, up to {needed.cache // checkpoint(model)} checkpoints of "
                       f"{readable_size(checkpoint(model))}"),
    ]  # fmt: skip
    yield f"{result.path}"
    yield f"on {place.title}, {context.n_ctx:,} tokens of context, {requests} at a time"
    yield ""
    yield f"  {_gib(place.capacity(context))}  {_memory(place)}"
    yield from (f"- {_gib(n_bytes)}  {text}" for n_bytes, text in parts if n_bytes)
    yield f"= {_gib(result.room)}  for weights: {_suggestion(result)}"


def _suggestion(result: Planned) -> str:
    """What to do with the room: a budget that can be had, or why there is none."""
    plain, weighted = result.smallest
    if result.room <= 0:
        return "not even the context fits"
    if result.room < weighted:
        return f"the smallest types take {readable_size(weighted)}"
    unit, name = (2**30, "GiB") if result.room >= 2**30 else (2**20, "MiB")
    text = f"convert --fit {result.room * 10 // unit / 10:.1f}{name}"
    return text if result.room >= plain else f"{text} --imatrix FILE"


def command(result: Planned, row: Row) -> str:
    """What makes the row's file, or uses the one that is there."""
    from stepgguf.cli.planning import OWN

    source = shlex.quote(str(result.path))
    if row.type == OWN:
        return f"stepgguf chat {source} --ctx {result.context.n_ctx}"
    verb = "convert" if result.path.is_dir() else "quantize"
    choice = row.type.replace("fit ", "--fit ") if row.type.startswith("fit ") else f"--type {shlex.quote(row.type)}"
    weighted, mtp = " --imatrix FILE" * row.needs_imatrix, "" if result.context.mtp else " --mtp drop"
    return f"stepgguf {verb} {source} models/ {choice}{weighted}{mtp}"


def table(rows: Sequence[Row], best: Row | None) -> Iterator[Text]:
    """One line a row, after the heads of the columns: the best stands out, what does not fit is dim."""
    is_measured = any(row.loss is not None for row in rows)
    last = "loss" if is_measured else "MTP"
    heads = ("type", "GiB", "bpw", "total", "fits", "longest", "GB/token", "tok/s", "full", last)
    cells = [
        (
            row.type + "*" * row.needs_imatrix,
            f"{row.weights / 2**30:.1f}",
            f"{row.bpw:.2f}",
            f"{row.total / 2**30:.1f}",
            "yes" if row.fits else "no",
            f"{row.n_ctx:,}" if row.n_ctx else "-",
            f"{row.empty.read / 1e9:.2f}",
            _tps(row.empty),
            _tps(row.full),
            _loss(row.loss) if is_measured else f"x{_span(*row.mtp_gain, 1)}" if row.mtp_gain else "-",
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
    styles = ["bold", *("bold green" if row is best else "" if row.fits else "dim" for row in rows)]
    for line, style in zip((heads, *cells), styles, strict=True):
        others = "".join(f"  {cell:>{w}}" for cell, w in zip(line[1:], widths[1:], strict=True))
        yield Text(f"{line[0]:<{widths[0]}}{others}", style)


def notes(result: Planned) -> Iterator[str]:
    """What to take, and what the figures rest on."""
    from stepgguf.fit.speed import ACCEPTED, DRAFTED

    what = "least predicted loss" if result.best and result.best.loss is not None else "largest"
    yield f"The {what} that fits is {result.best.type}." if result.best else "None of these fits."
    if any(row.needs_imatrix for row in result.rows):
        yield "* needs an importance matrix."
    if any(row.mtp_gain for row in result.rows):
        share = " to ".join(f"{share:.0%}" for share in ACCEPTED)
        yield f"MTP is for {DRAFTED} drafted tokens of which {share} are accepted (llama.cpp #24340)."
    yield from _basis(result.place.listed)


def _basis(listed: Listed | None) -> Iterator[str]:
    """What the speeds are made of."""
    if listed is None:
        yield "tok/s is unknown: how fast this machine reads memory is not in the list."
        return
    if not listed.measured:
        yield "tok/s is a ceiling, bandwidth / bytes read a token, and is not reached:"
        yield "no measurement of this model is published for this chip."
    else:
        n = len(listed.measured)
        yield "tok/s is an estimate: bandwidth / bytes read a token x efficiency, which is from"
        yield f"{n} published measurement{'s' * (n > 1)} of this model on this chip, without MTP:"
    yield f"  {listed.bandwidth / 1e9:>4g} GB/s   {listed.bandwidth_source}"
    for m in listed.measured:
        yield f"  {m.tps:>4g} tok/s  {m.tps * m.read / listed.bandwidth:.0%}: {m.file}"
        yield f"{'':14}{m.source}"
    yield f"Setup: {listed.setup}"


def _memory(place: Place) -> str:
    if place.machine.kind == "gpu":
        return f"for the model, in GPUs ({readable_size(place.have.limit)}) and RAM"
    if place.have.limit < place.have.ceiling:
        return f"for the model: {readable_size(place.have.limit)} that the GPU may have, and other RAM"
    return f"for the model: of {readable_size(place.machine.ram)}, {readable_size(place.have.reserve)} are the system's"


def _tps(pace: Pace) -> str:
    """21-32, <42 where only the ceiling is known."""
    if pace.tps is not None:
        return _span(*pace.tps)
    return "-" if pace.ceiling_tps is None else f"<{pace.ceiling_tps:.0f}"


def _loss(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.3g}" if loss < 1 else f"{loss:.2f}"


def _span(low: float, high: float, digits: int = 0) -> str:
    texts = f"{low:.{digits}f}", f"{high:.{digits}f}"
    return texts[0] if texts[0] == texts[1] else "-".join(texts)


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:7.2f} GiB"
