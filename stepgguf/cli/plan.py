"""stepgguf plan: what fits a machine, and how fast it would be there."""

from __future__ import annotations

from dataclasses import asdict
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from stepgguf.cli import arguments
from stepgguf.runtime.engine import DEFAULT_CTX

if TYPE_CHECKING:
    from stepgguf.fit.planning import MachinePlan, TargetMachine


def plan(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SRC",
            help=f"A checkpoint directory, or a GGUF (of a split one, any of its files); {arguments.ON_HUB}.",
        ),
    ],
    machine: Annotated[
        str | None,
        typer.Option(
            "--machine",
            "-m",
            metavar="NAME",
            show_default="auto",
            help="spark, strix-128, mac-128, cuda-24-128, ... (a wrong name lists them); auto is this one.",
        ),
    ] = None,
    gpu: Annotated[
        arguments.Cards | None,
        typer.Option(
            parser=arguments.Cards.parse,
            metavar="SIZE[*N]",
            help="A box that is in no list: the memory of its card, or of N such cards, e.g. 24GB*2; with --ram.",
        ),
    ] = None,
    ram: Annotated[
        int | None,
        typer.Option(parser=arguments.parse_memory, metavar="SIZE", help="RAM of such a box, e.g. 128GB."),
    ] = None,
    bandwidth: Annotated[
        int | None,
        typer.Option(
            parser=arguments.parse_bandwidth,
            metavar="SIZE/s",
            help="What such a box reads from its RAM, e.g. 90GB/s, for a ceiling of tok/s.",
        ),
    ] = None,
    ctx: Annotated[
        int, typer.Option(min=64, max=2**24, help="Context in tokens, for all requests together.")
    ] = DEFAULT_CTX,
    parallel: Annotated[int, typer.Option(min=1, max=4096, help="Requests at the same time.")] = 1,
    mtp: Annotated[Literal["include", "drop"], typer.Option(help="With the MTP blocks or without.")] = "include",
    types: Annotated[
        str | None,
        typer.Option(metavar="T,T", help="Stock types, recipes and .toml files. Default: a range, and all recipes."),
    ] = None,
    measure: Annotated[
        bool,
        typer.Option("--measure", help="Measure on a sample of the weights what types lose, and add what --fit takes."),
    ] = False,
    imatrix: arguments.ImatrixFile = None,
    imatrix_prior: arguments.ImatrixPriorOption = "pooled",
    threads: arguments.Threads = None,
    json: arguments.Json = False,
) -> None:
    """Show what fits a machine and how fast it would be there: a row for each type and recipe.

    - **GiB, bpw**: the file, MTP blocks included, and its bits per weight
    - **total**: GiB with everything else: KV cache, MTP, buffers, kept conversations
    - **longest**: the longest context with which it fits; "-" if none does
    - **GB/token**: weights that one token reads: all dense ones, but 8 of 288 experts
    - **tok/s, full**: predicted for one request without MTP, with an empty and with a full context
    - **cards, RAM, cpu-moe**, of boxes with cards: GiB on the cards (all weights but routed experts, and the KV cache)
      and in RAM; how many layers' experts are there at least, which is --n-cpu-moe; "no" if it does not fit
    - **MTP**: how many times as fast it is with two drafted tokens, at an empty context, by published acceptance
    - **loss**, with --measure: what --fit minimises, the predicted error of what the layers add; no KLD, but it orders

    No weights are read without --measure; with it a sample, once: what was measured is kept. Speeds are estimates from
    the bytes that are read; what they rest on is printed below the table.

    Examples:

    - `stepgguf plan Step-3.5-Flash/ --machine spark --ctx 131072`
    - `stepgguf plan Step-3.5-Flash/ --gpu 24GB*2 --ram 128GB --bandwidth 80GB/s`
    - `stepgguf plan Step-3.5-Flash/ --machine mac-128 --types Q4_K_S,IQ4_XS,mine.toml`
    - `stepgguf plan Step-3.5-Flash/ --machine strix-128 --measure --imatrix imatrix.gguf`
    - `stepgguf plan step-q4_k_s.gguf --machine strix-128 --parallel 4 --json`
    """
    from stepgguf.cli import output, plan_text
    from stepgguf.cli.conversion_plan import price_trunk
    from stepgguf.convert.budget import recipe_without_rules
    from stepgguf.convert.plan import Options
    from stepgguf.convert.sources.opening import open_source
    from stepgguf.fit.memory import ContextParams
    from stepgguf.fit.planning import plan_for_machine

    names = _split_names(types)
    if imatrix is not None and not measure:
        raise typer.BadParameter("an importance matrix counts only with --measure", param_hint="--imatrix")
    options = Options(recipe_without_rules("fit"), mtp, importance=arguments.read_importance(imatrix, imatrix_prior))
    context, target = ContextParams(ctx, parallel, mtp=mtp == "include"), _find_target(machine, gpu, ram, bandwidth)
    with open_source(source) as opened:
        output.warn(opened.notes)
        price = (lambda: price_trunk(opened, Path("plan.gguf"), options, threads=threads)) if measure else None
        result = plan_for_machine(opened, target, context, names, price)
    if ctx > result.footprint.n_ctx_train:
        output.warn(
            [f"{ctx:,} tokens are more than the {result.footprint.n_ctx_train:,} that the model was trained for"]
        )
    if json:
        output.print_json(json_report(result))
        return
    output.print_lines([str(source), *plan_text.budget_lines(result), ""])
    output.print_texts(plan_text.row_table(result))
    output.print_lines(["", *plan_text.closing_notes(result)])
    if result.best is not None:
        output.note(f"next: {plan_text.next_command(source, result, result.best)}")


def _split_names(types: str | None) -> list[str] | None:
    """--types as a list; None for its default."""
    if types is None:
        return None
    names = [name.strip() for name in types.split(",") if name.strip()]
    if not names:
        raise typer.BadParameter(f"{types!r} names no type", param_hint="--types")
    return names


def _find_target(
    machine: str | None, gpu: arguments.Cards | None, ram: int | None, bandwidth: int | None
) -> TargetMachine:
    """The machine that --machine names, or the box that --ram, --gpu and --bandwidth describe."""
    from stepgguf.fit.planning import THIS_MACHINE, described_box

    given = [name for name, value in (("--gpu", gpu), ("--ram", ram), ("--bandwidth", bandwidth)) if value is not None]
    if not given:
        return _find_machine(machine or THIS_MACHINE)
    if machine is not None:
        message = f"{machine} has its own memory and cards; leave out --machine, or {' and '.join(given)}"
        raise typer.BadParameter(message, param_hint="--machine")
    if ram is None:
        message = f"{' and '.join(given)} without --ram: give the box's RAM, too, e.g. --ram 128GB"
        raise typer.BadParameter(message, param_hint="--ram")
    return described_box(gpu or (), ram, bandwidth)


def _find_machine(name: str) -> TargetMachine:
    """--machine; a wrong name gets the nearest one and all that there are."""
    from stepgguf.fit.catalogue import load_catalogue
    from stepgguf.fit.planning import THIS_MACHINE, target_machine

    known = (THIS_MACHINE, *load_catalogue())
    if name in known:
        return target_machine(name)
    near = get_close_matches(name.lower(), known[1:], 1)
    guess = f" Did you mean {near[0]}?" if near else ""
    raise typer.BadParameter(
        f"{name!r} is not in the list of machines.{guess} Choose one of: {', '.join(known)}", param_hint="--machine"
    )


def json_report(result: MachinePlan) -> dict[str, Any]:
    """The plan as data; sizes in bytes, speeds in tok/s and bytes per second."""
    target, context = result.target, result.context
    return {
        "machine": {
            "title": target.title,
            "ram": target.machine.ram,
            "capacity": target.capacity(context),
            "devices": target.devices,
            "bandwidth": target.listed and target.listed.bandwidth,
            "card_bandwidth": target.listed and target.listed.card_bandwidth,
            "measured": [asdict(m) for m in target.listed.measured] if target.listed else [],
        },
        "context": asdict(context),
        "need": asdict(result.need),
        "unusable": result.unusable,
        "room": result.room,
        "rows": [asdict(row) for row in result.rows],
    }
