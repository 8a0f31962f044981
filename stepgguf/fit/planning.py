"""What a model would take on a machine as each type, and how fast it would answer: what `stepgguf plan` shows.

source   -> Inventory (sizes by type), Footprint (what else takes memory)  --+
weights  -> PricedTrunk: what types lose, if it is asked for
machine  -> TargetMachine: budget, bandwidth, published speeds               +-> MachinePlan: a PlanRow for each type
context  -> MemoryNeed, the same for all rows; what it leaves is for weights --+
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from stepgguf.convert.budget import Limits, PricedTrunk, smallest_size
from stepgguf.convert.sizes import Inventory, Sizes, take_inventory, with_near_sizes
from stepgguf.convert.sources.source import TensorSource
from stepgguf.errors import RecipeError, UnknownType
from stepgguf.files.byte_sizes import GIB, MIB
from stepgguf.fit import catalogue, speed
from stepgguf.fit.catalogue import ListedMachine
from stepgguf.fit.footprint import footprint_of
from stepgguf.fit.machine import Machine, probe_machine
from stepgguf.fit.memory import (
    ContextParams,
    Footprint,
    MemoryBudget,
    MemoryNeed,
    largest_context,
    memory_budget,
    memory_need,
)
from stepgguf.quants.recipe_files import shipped_names

STOCK_TYPES = (
    "IQ2_XXS", "IQ2_M", "Q2_K", "IQ3_XXS", "IQ3_S", "Q3_K_M", "IQ4_XS", "MXFP4_MOE", "Q4_K_S", "Q4_K_M", "Q5_K_M",
    "Q6_K", "Q8_0",
)  # fmt: skip
THIS_MACHINE = "auto"
OWN_TYPES = "this file"  # the row of a GGUF in its own types
N_BUDGET_ROWS = 6  # rows of what --fit would choose

SpeedRange = tuple[float, float]  # least and most


@dataclass(frozen=True, slots=True)
class TargetMachine:
    """A machine to plan for. `listed` knows how fast its memory is; None if nobody said."""

    title: str
    machine: Machine
    budget: MemoryBudget
    listed: ListedMachine | None

    def capacity(self, context: ContextParams) -> int:
        """Bytes for the model and all that running it takes.

        Where the GPU has a limit of its own, the conversation cache is beside it in RAM, and so is what a GPU with
        memory of its own cannot hold.
        """
        if self.machine.kind == "gpu":
            return self.budget.ceiling
        return min(self.budget.limit + context.cache_ram, self.budget.ceiling)

    def generation_speed(self, n_bytes: float) -> GenerationSpeed:
        """How fast a model answers here if a token reads n_bytes."""
        if self.listed is None:
            return GenerationSpeed(n_bytes, None, None)
        bandwidth, shares = self.listed.bandwidth, self.listed.efficiencies
        tps = (bandwidth * shares[0] / n_bytes, bandwidth * shares[-1] / n_bytes) if shares else None
        return GenerationSpeed(n_bytes, tps, bandwidth / n_bytes)


@dataclass(frozen=True, slots=True)
class GenerationSpeed:
    """The speed of one request without MTP. read: bytes that a token reads.

    tps: tok/s, least and most, by the efficiencies that were measured on this chip; None if none was. ceiling_tps:
    tok/s at the memory's full bandwidth; None if that is not known.
    """

    read: float
    tps: SpeedRange | None
    ceiling_tps: float | None


@dataclass(frozen=True, slots=True)
class PlanRow:
    """The model as one type or recipe. Sizes in bytes; total: with all that running it takes.

    n_ctx: the longest context that fits, None if none does. empty, full: at an empty and at a full context. mtp_gain:
    how many times as fast with MTP, None without it. loss: the allocator's cost of the types, where they were measured.
    """

    type: str
    needs_imatrix: bool
    weights: int
    bpw: float
    total: int
    fits: bool
    n_ctx: int | None
    empty: GenerationSpeed
    full: GenerationSpeed
    mtp_gain: SpeedRange | None
    loss: float | None = None


@dataclass(frozen=True, slots=True)
class MachinePlan:
    """All rows, by size, and what they share.

    need: what running the model takes besides its weights. room: what that leaves for weights, negative if nothing.
    smallest: what the smallest types of convert --fit take, without and with an imatrix.
    """

    target: TargetMachine
    footprint: Footprint
    context: ContextParams
    need: MemoryNeed
    room: int
    smallest: tuple[int, int]
    rows: tuple[PlanRow, ...]

    @property
    def best(self) -> PlanRow | None:
        """Of the rows that fit that with the least loss, or else the largest; None if none fits."""
        fitting = [row for row in self.rows if row.fits]
        measured = [row for row in fitting if row.loss is not None]
        return min(measured, key=lambda row: row.loss or 0.0) if measured else fitting[-1] if fitting else None


def target_machine(name: str) -> TargetMachine:
    """Look up a machine of the catalogue, or probe this one. KeyError for a name that is neither."""
    if name == THIS_MACHINE:
        here = probe_machine()
        return TargetMachine("this machine", here, memory_budget(here), catalogue.find_listed(here))
    listed = catalogue.load_catalogue()[name]
    return TargetMachine(listed.title, listed.machine, memory_budget(listed.machine), listed)


def plan_for_machine(
    source: TensorSource,
    target: TargetMachine,
    context: ContextParams,
    names: Sequence[str] | None,
    price: Callable[[], PricedTrunk] | None = None,
) -> MachinePlan:
    """Plan all rows for a model. names: types and recipes; None: STOCK_TYPES, and the recipes that fit the model.

    price: measures the trunk, for every row's loss and for rows of what convert --fit would choose. It is called when
    nothing else can be wrong: RecipeError is raised before.
    """
    model = take_inventory(source)
    size = replace(footprint_of(source), weights=0)
    needed = memory_need(size, context)
    room = target.capacity(context) - needed.total
    try:
        named = list(_named_sizes(model, context.mtp, names))
    except UnknownType as error:
        raise with_near_sizes(error, model) from None
    trunk = price() if price is not None else None
    if trunk is not None:
        named += _budget_sizes(model, context.mtp, trunk, room)
    planner = _RowPlanner(model, size, target, context, trunk)
    return MachinePlan(
        target=target,
        footprint=size,
        context=context,
        need=needed,
        room=room,
        smallest=(
            smallest_size(model, mtp=context.mtp, has_imatrix=False),
            smallest_size(model, mtp=context.mtp, has_imatrix=True),
        ),
        rows=tuple(sorted((planner.row(name, sizes) for name, sizes in named), key=lambda row: row.weights)),
    )


def _named_sizes(inventory: Inventory, mtp: bool, names: Sequence[str] | None) -> Iterator[tuple[str, Sizes]]:
    """The file's own types if it has any, then those that are asked for."""
    own = inventory.own_sizes(mtp=mtp)
    if own is not None:
        yield OWN_TYPES, own
    if names is not None:
        yield from ((name, inventory.sizes_as(name, mtp=mtp)) for name in names)
        return
    yield from ((name, inventory.sizes_as(name, mtp=mtp)) for name in STOCK_TYPES)
    for name in shipped_names():
        try:
            yield name, inventory.sizes_as(name, mtp=mtp)
        except RecipeError:  # it names layers that only the real model has
            continue


def _budget_sizes(model: Inventory, mtp: bool, trunk: PricedTrunk, room: int) -> Iterator[tuple[str, Sizes]]:
    """The best types for budgets from the room down to the smallest types, evenly spaced and rounded down."""
    least = trunk.smallest_file
    most = min(room, trunk.other_bytes + trunk.largest_bytes)
    # Rounded down to a tenth of a unit, so that `--fit` with the row's name takes the row's types.
    unit = (GIB if most >= GIB else MIB) / 10
    budgets = {math.floor((most - i * (most - least) / N_BUDGET_ROWS) / unit) * unit for i in range(N_BUDGET_ROWS)}
    for n_bytes in (math.ceil(budget) for budget in budgets if budget >= least):
        limits = Limits(n_bytes)
        types = trunk.choose_types(trunk.room(limits))
        mtp_types = {t.name: t.ggml_type for t in trunk.draft.tensors if t.name not in types}
        yield limits.name.replace("-", " "), model.sizes_with(types | mtp_types, mtp=mtp)


@dataclass(frozen=True, slots=True)
class _RowPlanner:
    """Makes rows; its fields are what all rows share. footprint: without weights."""

    inventory: Inventory
    footprint: Footprint
    target: TargetMachine
    context: ContextParams
    trunk: PricedTrunk | None

    def row(self, name: str, sizes: Sizes) -> PlanRow:
        model, capacity = replace(self.footprint, weights=sizes.total), self.target.capacity(self.context)
        total = memory_need(model, self.context).total
        return PlanRow(
            type=name,
            needs_imatrix=sizes.needs_imatrix,
            weights=sizes.total,
            bpw=sizes.total * 8 / sizes.n_values,
            total=total,
            fits=total <= capacity,
            n_ctx=largest_context(model, self.context, capacity),
            empty=self._speed(sizes, 0),
            full=self._speed(sizes, self.context.n_ctx),
            mtp_gain=self._mtp_gain(sizes) if sizes.mtp else None,
            loss=self.trunk.predicted_loss(sizes.types) if self.trunk is not None else None,
        )

    def _step_bytes(self, sizes: Sizes, n_tokens: int) -> float:
        """Bytes of the weights that a step of n_tokens reads."""
        share = speed.expert_share(self.footprint.n_expert_used, self.inventory.facts.n_expert, n_tokens)
        return speed.step_bytes(sizes.trunk, share)

    def _speed(self, sizes: Sizes, depth: int) -> GenerationSpeed:
        """The speed after `depth` tokens."""
        return self.target.generation_speed(self._step_bytes(sizes, 1) + speed.kv_read_bytes(self.footprint, depth))

    def _mtp_gain(self, sizes: Sizes) -> SpeedRange:
        """The gain by the lowest and by the highest published share of accepted tokens."""
        n = min(speed.DRAFTED, self.inventory.n_mtp)
        one, several = self._step_bytes(sizes, 1), self._step_bytes(sizes, 1 + n)
        # The blocks are equally large, and drafting reads as many of them as tokens are drafted.
        drafting = n * sizes.mtp / max(1, self.inventory.n_mtp)
        low, high = (speed.mtp_gain(one, several, drafting, 1 + n * share) for share in speed.ACCEPTED)
        return low, high
