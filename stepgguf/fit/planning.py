"""What a model would take on a machine as each type, and how fast it would answer: what `stepgguf plan` shows.

source   -> Inventory (sizes by type), Footprint (what else takes memory)  --+
weights  -> PricedTrunk: what types lose, if it is asked for
machine  -> TargetMachine: budget, bandwidth, published speeds               +-> MachinePlan: a PlanRow for each type
context  -> MemoryNeed, the same for all rows; what it leaves is for weights --+
cards    -> PlacedModel of each row: what is on them, what in RAM
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
    card_budgets,
    largest_context,
    longest_context,
    memory_budget,
    memory_need,
)
from stepgguf.fit.placement import ModelParts, PlacedModel, place, unusable_room, weight_parts, with_context
from stepgguf.fit.speed import StepBytes
from stepgguf.model.names import TensorName
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

    @property
    def has_cards(self) -> bool:
        """Whether GPUs have memory of their own, and RAM beside it holds what they cannot."""
        return self.machine.kind == "gpu"

    @property
    def devices(self) -> tuple[int, ...]:
        """Bytes for the model on each card, or on each of several machines; none where all is one memory."""
        if self.has_cards:
            return card_budgets(self.machine.gpus)
        nodes = self.listed.nodes if self.listed is not None else 1
        return (self.budget.limit,) * nodes if nodes > 1 else ()

    @property
    def ram(self) -> int:
        """Bytes for the model in RAM beside cards."""
        return self.budget.ceiling - self.budget.limit if self.has_cards else 0

    def capacity(self, context: ContextParams) -> int:
        """Bytes for the model and all that running it takes.

        Where the GPU has a limit of its own, the conversation cache is beside it in RAM, and so is what a GPU with
        memory of its own cannot hold.
        """
        if self.devices:
            return sum(self.devices) + self.ram
        return min(self.budget.limit + context.cache_ram, self.budget.ceiling)

    def place(self, parts: ModelParts) -> PlacedModel | None:
        """Place a model on the devices; None if it does not fit."""
        return place(parts if self.has_cards else parts.without_ram, self.devices, self.ram)

    def generation_speed(self, step: StepBytes) -> GenerationSpeed:
        """How fast a model answers here if a token reads this."""
        seconds = self._seconds(step)
        if self.listed is None or seconds is None:
            return GenerationSpeed(step.total, None, None)
        if not self.listed.efficiencies:
            return GenerationSpeed(step.total, None, 1 / seconds)
        low, high = speed.efficiency_range(self.listed.efficiencies)
        return GenerationSpeed(step.total, (low / seconds, high / seconds), 1 / seconds)

    def cost(self, step: StepBytes) -> float | None:
        """What reading this costs, in any unit: bytes of one memory, seconds of several; None where that is unknown."""
        if not self.has_cards:
            return step.total
        return self._seconds(step) if self.listed is not None and self.listed.card_bandwidth is not None else None

    def _seconds(self, step: StepBytes) -> float | None:
        return None if self.listed is None else step.seconds(self.listed.bandwidth, self.listed.card_bandwidth)


@dataclass(frozen=True, slots=True)
class GenerationSpeed:
    """The speed of one request without MTP. read: bytes that a token reads.

    tps: tok/s, least and most, by speed.efficiency_range() of this chip; None if nothing was measured on it.
    ceiling_tps: tok/s at the memory's full bandwidth; None if that is not known.
    """

    read: float
    tps: SpeedRange | None
    ceiling_tps: float | None


@dataclass(frozen=True, slots=True)
class PlanRow:
    """The model as one type or recipe. Sizes in bytes; total: with all that running it takes.

    n_ctx: the longest context that fits, None if none does. empty, full: at an empty and at a full context. mtp_gain:
    how many times as fast with MTP, None without it. loss: the allocator's cost of the types, where they were measured.
    placed: on cards or machines, if it fits there.
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
    placed: PlacedModel | None = None


@dataclass(frozen=True, slots=True)
class MachinePlan:
    """All rows, by size, and what they share.

    need: what running the model takes besides its weights. unusable: what whole layers leave free on cards, at worst.
    room: what all that leaves for weights, negative if nothing.
    smallest: what the smallest types of convert --fit take, without and with an imatrix.
    """

    target: TargetMachine
    footprint: Footprint
    context: ContextParams
    need: MemoryNeed
    unusable: int
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


def described_box(cards: Sequence[int], ram: int, bandwidth: float | None) -> TargetMachine:
    """A box that is in no list. cards, ram: bytes. bandwidth: of the RAM, in bytes per second; None if not known."""
    box = catalogue.describe_box(cards, ram)
    memories = [f"{cards.count(n_bytes)} x {n_bytes / GIB:g} GiB" for n_bytes in sorted(set(cards))]
    title = ", ".join([*memories, f"{ram / GIB:g} GiB RAM"])
    listed = ListedMachine("", title, box, bandwidth, "RAM: as given", "", ()) if bandwidth is not None else None
    return TargetMachine(title, box, memory_budget(box), listed)


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
    needed = replace(needed, compute=needed.compute * max(1, len(target.devices)))  # each has buffers of its own
    unusable = unusable_room(needed, target.devices, target.ram, model.n_expert_layers)
    room = target.capacity(context) - needed.total - unusable
    if target.has_cards:  # what goes with the context has to be on them
        on_cards = sum(target.devices) - needed.device
        room = room if on_cards > 0 else on_cards
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
        unusable=unusable,
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
class _Fit:
    """How a row fits: PlanRow says what the fields are."""

    total: int
    fits: bool
    n_ctx: int | None
    placed: PlacedModel | None = None


@dataclass(frozen=True, slots=True)
class _RowPlanner:
    """Makes rows; its fields are what all rows share. footprint: without weights."""

    inventory: Inventory
    footprint: Footprint
    target: TargetMachine
    context: ContextParams
    trunk: PricedTrunk | None

    def row(self, name: str, sizes: Sizes) -> PlanRow:
        fitted = self._on_devices(sizes) if self.target.devices else self._in_one_memory(sizes)
        return PlanRow(
            type=name,
            needs_imatrix=sizes.needs_imatrix,
            weights=sizes.total,
            bpw=sizes.total * 8 / sizes.n_values,
            total=fitted.total,
            fits=fitted.fits,
            n_ctx=fitted.n_ctx,
            empty=self._speed(sizes, 0, fitted),
            full=self._speed(sizes, self.context.n_ctx, fitted),
            mtp_gain=self._mtp_gain(sizes, fitted) if sizes.mtp else None,
            loss=self.trunk.predicted_loss(sizes.types) if self.trunk is not None else None,
            placed=fitted.placed,
        )

    def _in_one_memory(self, sizes: Sizes) -> _Fit:
        model, capacity = replace(self.footprint, weights=sizes.total), self.target.capacity(self.context)
        total = memory_need(model, self.context).total
        return _Fit(total, total <= capacity, largest_context(model, self.context, capacity))

    def _on_devices(self, sizes: Sizes) -> _Fit:
        weights = weight_parts(sizes, len(self.footprint.mtp_layers) if self.context.mtp else 0)

        def at(n_ctx: int) -> PlacedModel | None:
            return self.target.place(with_context(weights, self.footprint, replace(self.context, n_ctx=n_ctx)))

        placed = at(self.context.n_ctx)
        total = sizes.total + memory_need(self.footprint, self.context).total
        if placed is not None:
            total = sum(placed.cards) + placed.ram
        n_ctx = longest_context(self.footprint.n_ctx_train, lambda n_ctx: at(n_ctx) is not None)
        return _Fit(total, placed is not None, n_ctx, placed)

    def _step_bytes(self, sizes: Sizes, n_tokens: int, fitted: _Fit) -> StepBytes:
        """The weights that a step of n_tokens reads, each where it is; of what has no place on cards, as if on them."""
        share = speed.expert_share(self.footprint.n_expert_used, self.inventory.facts.n_expert, n_tokens)
        total = speed.step_bytes(sizes.trunk, share)
        if not self.target.has_cards:
            return StepBytes(total)
        n_cpu_moe = fitted.placed.n_cpu_moe if fitted.placed is not None else 0
        ram = speed.step_bytes(((name, n) for name, n in sizes.trunk if _is_in_ram(name, n_cpu_moe)), share)
        return StepBytes(ram, total - ram)

    def _speed(self, sizes: Sizes, depth: int, fitted: _Fit) -> GenerationSpeed:
        """The speed after `depth` tokens."""
        step, cache = self._step_bytes(sizes, 1, fitted), speed.kv_read_bytes(self.footprint, depth)
        step = replace(step, cards=step.cards + cache) if self.target.has_cards else StepBytes(step.ram + cache)
        if self._has_no_place(fitted):
            return GenerationSpeed(step.total, None, None)
        return self.target.generation_speed(step)

    def _mtp_gain(self, sizes: Sizes, fitted: _Fit) -> SpeedRange | None:
        """The gain by the lowest and by the highest published share of accepted tokens; None if costs are not known."""
        n = min(speed.DRAFTED, self.inventory.n_mtp)
        # The blocks are equally large, and drafting reads as many of them as tokens are drafted.
        drafting = StepBytes(0.0, n * sizes.mtp / max(1, self.inventory.n_mtp))
        steps = (self._step_bytes(sizes, 1, fitted), self._step_bytes(sizes, 1 + n, fitted), drafting)
        costs = [cost for step in steps if (cost := self.target.cost(step)) is not None]
        if len(costs) < len(steps) or self._has_no_place(fitted):
            return None
        low, high = (speed.mtp_gain(costs[0], costs[1], costs[2], 1 + n * share) for share in speed.ACCEPTED)
        return low, high

    def _has_no_place(self, fitted: _Fit) -> bool:
        """Whether nothing says which part would be read from cards and which from RAM."""
        return self.target.has_cards and not fitted.fits


def _is_in_ram(name: TensorName, n_cpu_moe: int) -> bool:
    return name.is_expert and name.layer is not None and name.layer < n_cpu_moe
