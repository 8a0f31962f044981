"""What a model would take on a machine as each type, and how fast it would answer: what `stepgguf plan` shows.

SRC      -> Inventory (sizes by type), Footprint (what else takes memory)  --+
weights  -> Trunk: what types lose, if it is asked for
machine  -> Place: budget, bandwidth, published speeds                       +-> Planned: a Row for each type
context  -> Need, the same for all rows; what it leaves is for weights     --+
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path

import typer

from stepgguf.cli import output
from stepgguf.cli.converting import sized
from stepgguf.convert.budget import Limits, Trunk, smallest_size
from stepgguf.convert.sizes import Inventory, Sizes, inventory
from stepgguf.convert.sources.opening import open_source
from stepgguf.convert.sources.source import TensorSource
from stepgguf.errors import RecipeError, UnknownType
from stepgguf.fit import catalogue, speed
from stepgguf.fit.catalogue import Listed
from stepgguf.fit.footprint import footprint
from stepgguf.fit.machine import Machine, probe
from stepgguf.fit.memory import Budget, Context, Footprint, Need, budget, largest_context, need
from stepgguf.quants.recipe_files import shipped_names

TYPES = (
    "IQ2_XXS", "IQ2_M", "Q2_K", "IQ3_XXS", "IQ3_S", "Q3_K_M", "IQ4_XS", "MXFP4_MOE", "Q4_K_S", "Q4_K_M", "Q5_K_M",
    "Q6_K", "Q8_0",
)  # fmt: skip
AUTO = "auto"
FRONTIER = 6  # rows of what --fit would choose
OWN = "this file"  # the row of a GGUF in its own types

Span = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Place:
    """A machine to plan for. `listed` knows how fast its memory is; None if nobody said."""

    title: str
    machine: Machine
    have: Budget
    listed: Listed | None

    def capacity(self, context: Context) -> int:
        """Bytes for everything. Where the GPU has a limit of its own, the conversation cache is beside it in RAM, and
        so is what a GPU with memory of its own cannot hold."""
        if self.machine.kind == "gpu":
            return self.have.ceiling
        return min(self.have.limit + context.cache_ram, self.have.ceiling)

    def tps(self, n_bytes: float) -> Span | None:
        """tok/s, least and most, by the efficiencies that were measured there."""
        if self.listed is None or not self.listed.efficiencies:
            return None
        efficiencies = self.listed.efficiencies
        return self.listed.bandwidth * efficiencies[0] / n_bytes, self.listed.bandwidth * efficiencies[-1] / n_bytes

    def ceiling_tps(self, n_bytes: float) -> float | None:
        """tok/s if memory were read at its full bandwidth."""
        return None if self.listed is None else self.listed.bandwidth / n_bytes


@dataclass(frozen=True, slots=True)
class Pace:
    """One request without MTP at some depth: bytes that a token reads, tok/s (least and most), and the limit."""

    read: float
    tps: Span | None
    ceiling_tps: float | None


@dataclass(frozen=True, slots=True)
class Row:
    """One type. Sizes in bytes; n_ctx: the longest context that fits; empty, full: the context; mtp_gain: a factor.
    loss: the allocator's cost of its types, where they were measured."""

    type: str
    needs_imatrix: bool
    weights: int
    bpw: float
    total: int
    fits: bool
    n_ctx: int | None
    empty: Pace
    full: Pace
    mtp_gain: Span | None
    loss: float | None = None


@dataclass(frozen=True, slots=True)
class Planned:
    """Rows by size. need: all but the weights; room: what that leaves for weights, negative if nothing. smallest: what
    the smallest types of convert --fit take, without and with an imatrix."""

    path: Path
    place: Place
    footprint: Footprint
    context: Context
    need: Need
    room: int
    smallest: tuple[int, ...]
    rows: tuple[Row, ...]

    @property
    def best(self) -> Row | None:
        """Of the rows that fit that with the least loss, or else the largest."""
        fitting = [row for row in self.rows if row.fits]
        measured = [row for row in fitting if row.loss is not None]
        return min(measured, key=lambda row: row.loss or 0.0) if measured else fitting[-1] if fitting else None


def place(name: str) -> Place:
    """A machine of the catalogue, or this one. typer.BadParameter for a name that is neither."""
    if name == AUTO:
        here = probe()
        return Place("this machine", here, budget(here), catalogue.like(here))
    listed = catalogue.load()
    if name not in listed:
        near = get_close_matches(name.lower(), listed, 1)
        guess = f"; did you mean {near[0]}?" if near else ""
        known = ", ".join((AUTO, *listed))
        raise typer.BadParameter(f"{name!r} is not a machine{guess} Known: {known}", param_hint="--machine")
    found = listed[name]
    return Place(found.title, found.machine, budget(found.machine), found)


def planned(
    path: Path,
    where: Place,
    context: Context,
    names: Sequence[str] | None,
    pricing: Callable[[TensorSource], Trunk] | None = None,
) -> Planned:
    """All rows for a checkpoint or a GGUF; names None: TYPES, and the recipes that fit the model.

    pricing: measures the trunk, for every row's loss and for rows of what convert --fit would choose.
    """
    with open_source(path) as source:
        output.warn(source.notes)
        model = inventory(source)
        size = footprint(source)
        trunk = pricing(source) if pricing is not None else None
    size = replace(size, weights=0)
    needed = need(size, context)
    room = where.capacity(context) - needed.total
    try:
        named = list(_sizes(model, context.mtp, names))
    except UnknownType as error:
        raise sized(error, model) from None
    found = [*named, *(_frontier(model, context.mtp, trunk, room) if trunk else ())]
    rows = (
        _row(name, sizes, model, replace(size, weights=sizes.total), where, context, trunk) for name, sizes in found
    )
    smallest = tuple(smallest_size(model, mtp=context.mtp, has_imatrix=has) for has in (False, True))
    in_order = tuple(sorted(rows, key=lambda row: row.weights))
    return Planned(path, where, size, context, needed, room, smallest, in_order)


def _frontier(model: Inventory, mtp: bool, trunk: Trunk, room: int) -> Iterator[tuple[str, Sizes]]:
    """The best types for budgets from the room down to the smallest types, evenly spaced and rounded down."""
    least = trunk.smallest_file
    most = min(room, trunk.beside + trunk.most)
    unit = (2**30 if most >= 2**30 else 2**20) / 10
    sizes = {math.floor((most - i * (most - least) / FRONTIER) / unit) * unit for i in range(FRONTIER)}
    for size in (math.ceil(size) for size in sizes if size >= least):
        limits = Limits(size)
        types = trunk.choose(trunk.room(limits))
        mtp_types = {t.name: t.ggml_type for t in trunk.sketch.tensors if t.name not in types}
        yield limits.name.replace("-", " "), model.with_types(types | mtp_types, mtp=mtp)


def _sizes(inventory: Inventory, mtp: bool, names: Sequence[str] | None) -> Iterator[tuple[str, Sizes]]:
    own = inventory.own_sizes(mtp=mtp)
    if own is not None:
        yield OWN, own
    if names is not None:
        yield from ((name, inventory.sizes(name, mtp=mtp)) for name in names)
        return
    yield from ((name, inventory.sizes(name, mtp=mtp)) for name in TYPES)
    for name in shipped_names():
        try:
            yield name, inventory.sizes(name, mtp=mtp)
        except RecipeError:  # it names layers that only the real model has
            continue


def _row(
    name: str,
    sizes: Sizes,
    inventory: Inventory,
    model: Footprint,
    where: Place,
    context: Context,
    trunk: Trunk | None,
) -> Row:
    capacity, total = where.capacity(context), need(model, context).total

    def step(n_tokens: int) -> float:
        share = speed.expert_share(model.n_expert_used, inventory.facts.n_expert, n_tokens)
        return speed.step_bytes(sizes.trunk, share)

    def pace(depth: int) -> Pace:
        read = step(1) + speed.cache_bytes(model, depth)
        return Pace(read, where.tps(read), where.ceiling_tps(read))

    n = min(speed.DRAFTED, inventory.n_mtp)
    drafting = n * sizes.mtp / max(1, inventory.n_mtp)
    low, high = (speed.mtp_gain(step(1), step(1 + n), drafting, 1 + n * share) for share in speed.ACCEPTED)
    return Row(
        type=name,
        needs_imatrix=sizes.needs_imatrix,
        weights=sizes.total,
        bpw=sizes.total * 8 / sizes.n_values,
        total=total,
        fits=total <= capacity,
        n_ctx=largest_context(model, context, capacity),
        empty=pace(0),
        full=pace(context.n_ctx),
        mtp_gain=(low, high) if sizes.mtp else None,
        loss=trunk.loss(sizes.types) if trunk is not None else None,
    )
