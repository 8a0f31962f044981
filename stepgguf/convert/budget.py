"""A budget instead of a type: what a model may take, what a token may read, and the types that lose least within both.

    draft plan -> tensors --measure--> errors of each type --objective--> costs --allocate--> types -> plan
                         or: costs from a file (cost_file.py), which calibration has made
    smallest and largest plan: known without measuring, they say whether there is anything to choose

The rules of a recipe stand: what one fixes is paid from the budget first, a floor bounds the choice. So are the MTP
blocks paid first, whose errors cost speed and never an answer. What is chosen depends on the source, the importance
matrix and the budget alone, so that an interrupted conversion goes on with the same types.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gguf import GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType

from stepgguf.convert import measure, objective
from stepgguf.convert.cost_file import TypeCosts
from stepgguf.convert.measure import Progress
from stepgguf.convert.pipeline import Compiling
from stepgguf.convert.plan import Options, Plan, PlannedTensor
from stepgguf.convert.planner import plan_source
from stepgguf.convert.sizes import Inventory, take_inventory
from stepgguf.convert.sources.source import TensorSource
from stepgguf.errors import DoesNotFit, RecipeError
from stepgguf.files.byte_sizes import readable_size, size_word
from stepgguf.model.tensors import TensorSpec
from stepgguf.quants.allocate import TensorOptions, TypeOption, allocate_bytes
from stepgguf.quants.mixtures import TypeChoice
from stepgguf.quants.recipe import Recipe
from stepgguf.quants.recipe_files import load_recipe
from stepgguf.quants.types import bits_per_weight, fitting_type

_HEADER = 16 * 2**20  # bytes of keys and tensor infos, with room to spare: published files have 10 MB
REASON = "least loss in the budget"
UNIFORM = "types are chosen without an importance matrix: all channels and experts count alike (see --imatrix)"


@dataclass(frozen=True, slots=True)
class Limits:
    """At least one is given. n_bytes: of all files. bpw: of all tensors. read_bytes: of the trunk, for one token."""

    n_bytes: int | None = None
    bpw: float | None = None
    read_bytes: float | None = None

    @property
    def name(self) -> str:
        """The budget as a part of a file's name: fit-104GiB-4.2bpw."""
        parts = [
            f"fit-{size_word(self.n_bytes)}" if self.n_bytes is not None else None,
            f"{self.bpw:g}bpw" if self.bpw is not None else None,
            f"{size_word(self.read_bytes)}-a-token" if self.read_bytes is not None else None,
        ]
        return "-".join(part for part in parts if part is not None)


def resolve_recipe(type_name: str | None, limits: Limits | None, default: str) -> tuple[Recipe, Limits | None]:
    """The recipe that a type's name or a budget stands for, and the budget: the one given, or the recipe's own bpw.

    RecipeError for a stock mixture with a budget, which would leave nothing of it.
    """
    if limits is None:
        chosen = load_recipe(default if type_name is None else type_name)
        return chosen, Limits(bpw=chosen.bpw) if chosen.bpw is not None else None
    if type_name is None:
        return recipe_without_rules(limits.name), limits
    chosen = load_recipe(type_name)
    if chosen.is_stock:
        raise RecipeError(
            f"{chosen.name} says the type of every tensor, and so does a budget ({limits.name})",
            hint="Leave --type out, or give a recipe: its rules stay, and the budget is for all other tensors.",
        )
    return replace(chosen, name=f"{chosen.name}-{limits.name}", default=None, base=None, bpw=None), limits


def recipe_without_rules(name: str) -> Recipe:
    """A recipe that leaves every type to the budget."""
    return Recipe(name, "", name, "", ())


@dataclass(frozen=True, slots=True)
class PricedTrunk:
    """What each type would cost each tensor of the trunk.

    items: for the allocator, in the plan's order. draft: the plan that was measured. n_bytes: of its trunk.
    in_nats: whether costs are KL divergence, in nats a token; else they only order types.
    """

    items: Sequence[TensorOptions]
    draft: Plan
    n_bytes: int
    in_nats: bool

    @property
    def other_bytes(self) -> int:
        """Bytes of all files that are not the trunk's: headers, padding, MTP blocks."""
        return self.draft.file_bytes - self.n_bytes

    @property
    def smallest_bytes(self) -> int:
        """Bytes of the trunk in its smallest types."""
        return sum(min(option.n_bytes for option in item.options) for item in self.items)

    @property
    def smallest_file(self) -> int:
        """Bytes of all files with the smallest types, at most: the padding between tensors may be less."""
        return self.other_bytes + self.smallest_bytes + GGUF_DEFAULT_ALIGNMENT * len(self.items)

    @property
    def largest_bytes(self) -> int:
        """Bytes of the trunk in its largest types."""
        return sum(max(option.n_bytes for option in item.options) for item in self.items)

    def room(self, limits: Limits) -> float:
        """Bytes that the budget leaves for the trunk."""
        room = math.inf if limits.n_bytes is None else limits.n_bytes - self.other_bytes
        if limits.bpw is None:
            return room
        return min(room, math.floor(limits.bpw * self.draft.n_values / 8) - (self.draft.n_bytes - self.n_bytes))

    def choose_types(self, room: float, read_bytes: float = math.inf) -> dict[str, GGMLQuantizationType]:
        """Name -> type, at the least cost in so many bytes. DoesNotFit if the smallest types take more."""
        found = allocate_bytes(self.items, max_bytes=room, max_read_bytes=read_bytes)
        return {item.name: option.ggml_type for item, option in zip(self.items, found.options, strict=True)}

    def predicted_loss(self, types: Mapping[str, GGMLQuantizationType]) -> float | None:
        """What these types cost in all; None if one of them was not measured."""
        costs = [{o.ggml_type: o.cost for o in item.options}.get(types[item.name]) for item in self.items]
        known = [cost for cost in costs if cost is not None]
        return math.fsum(known) if len(known) == len(costs) else None


def plan_within(limits: Limits, source: TensorSource, dest: Path, options: Options, trunk: PricedTrunk) -> Plan:
    """The plan whose types cost least within the budget. trunk: what types cost, measured with the same options.

    The budget must hold the smallest types: `plan_without_measuring` refuses one that does not.
    """
    room = trunk.room(limits)
    # Padding and the headers of splits depend on the types, so what is too large is tried again with less room. It
    # ends at the smallest types at the latest, which fit.
    while True:
        types = trunk.choose_types(room, math.inf if limits.read_bytes is None else limits.read_bytes)
        allocated = {name: TypeChoice(ggml_type, REASON) for name, ggml_type in types.items()}
        predicted = trunk.predicted_loss(types) if trunk.in_nats else None
        plan = plan_source(source, dest, replace(options, allocated=allocated, predicted_kld=predicted))
        excess = 0 if limits.n_bytes is None else plan.file_bytes - limits.n_bytes
        if excess <= 0:
            break
        room = max(trunk.smallest_bytes, min(room, trunk.largest_bytes) - excess)
    return plan if options.importance is not None else replace(plan, warnings=(*plan.warnings, UNIFORM))


def plan_without_measuring(limits: Limits, source: TensorSource, dest: Path, options: Options) -> Plan | None:
    """The plan if nothing has to be measured for it: the largest types fit. DoesNotFit if not even the smallest do."""
    model = take_inventory(source)
    smallest = _plan_extreme(min, model, source, dest, options)
    if not _is_within(limits, smallest, model):
        read = readable_size(_read_bytes(smallest, model))
        token = f", {read} read for a token" if limits.read_bytes is not None else ""
        raise DoesNotFit(
            f"{limits.name}: with the smallest types the files have {smallest.file_bytes:,} bytes "
            f"({readable_size(smallest.file_bytes)}, {smallest.bpw:.3f} bpw{token})",
            hint="Give a larger budget, an --imatrix (types below Q2_K and IQ3_S need one), or leave out MTP blocks.",
        )
    largest = _plan_extreme(max, model, source, dest, options)
    if not _is_within(limits, largest, model):
        return None
    types = ", ".join(sorted({t.ggml_type.name for t in largest.tensors if t.reason == REASON}))
    in_all = readable_size(largest.file_bytes)
    note = f"the budget holds the largest types that it chooses from ({types}, {in_all} in all)"
    return replace(largest, warnings=(*largest.warnings, note))


def _extreme_types(
    pick: Callable[..., GGMLQuantizationType], model: Inventory, options: Options, *, has_imatrix: bool | None = None
) -> dict[str, GGMLQuantizationType]:
    """Name -> the smallest (pick: min) or largest (max) type of each tensor that no rule decides.

    has_imatrix: whether there shall be an importance matrix for all tensors; None: what the options have.
    """
    types: dict[str, GGMLQuantizationType] = {}
    for tensor in _undecided_tensors(model, options):
        possible = measure.possible_types(tensor.name, tensor.shape, options.importance, has_imatrix=has_imatrix)
        floor = options.recipe.floor_type(tensor, model.facts)
        if floor is not None:
            least = bits_per_weight(floor)
            possible = {each for each in possible if bits_per_weight(each) >= least} or {floor}
        types[tensor.name] = pick(possible, key=bits_per_weight)
    return types


def smallest_size(model: Inventory, *, mtp: bool, has_imatrix: bool) -> int:
    """Bytes of a file with the smallest types that a budget chooses, whatever its vocabulary."""
    types = _extreme_types(min, model, Options(recipe_without_rules("fit")), has_imatrix=has_imatrix)
    mtp_types = {t.name: _q8_0(t.shape) for t in model.tensors if t.is_mtp and t.is_quantizable}
    return model.sizes_with(types | mtp_types, mtp=mtp).total + _HEADER


def _plan_extreme(
    pick: Callable[..., GGMLQuantizationType],
    model: Inventory,
    source: TensorSource,
    dest: Path,
    options: Options,
) -> Plan:
    """The plan with the smallest (pick: min) or largest (max) types."""
    types = _extreme_types(pick, model, options)
    allocated = {name: TypeChoice(ggml_type, REASON) for name, ggml_type in types.items()}
    return plan_source(source, dest, replace(options, allocated=allocated))


def _is_within(limits: Limits, plan: Plan, model: Inventory) -> bool:
    return (
        (limits.n_bytes is None or plan.file_bytes <= limits.n_bytes)
        and (limits.bpw is None or plan.bpw <= limits.bpw)
        and (limits.read_bytes is None or _read_bytes(plan, model) <= limits.read_bytes)
    )


def _read_bytes(plan: Plan, model: Inventory) -> float:
    """Bytes of the trunk that are read for one token."""
    trunk = {t.name for t in model.tensors if not t.is_mtp}
    shares = {t.name: t.n_bytes * objective.read_share(t, model.routing) for t in plan.tensors if t.name in trunk}
    return math.fsum(shares.values())


def _draft_plan(model: Inventory, source: TensorSource, dest: Path, options: Options) -> Plan:
    """The plan with all that no rule decides as Q8_0, in one file (and one of MTP blocks, if they are separate)."""
    allocated: dict[str, TypeChoice] = {
        t.name: TypeChoice(_q8_0(t.shape), "draft") for t in _undecided_tensors(model, options)
    }
    return plan_source(source, dest, replace(options, allocated=allocated, split_max_size=None))


def price_trunk(
    source: TensorSource,
    dest: Path,
    options: Options,
    *,
    costs: TypeCosts | None = None,
    threads: int | None = None,
    progress: Progress = lambda tensor, kept: None,
    compiling: Compiling = lambda name: None,
) -> PricedTrunk:
    """What each type would cost each tensor, where the options leave more than one: `costs`, or else it is measured.

    CostsError if the costs lack some of them.
    """
    model = take_inventory(source)
    draft = _draft_plan(model, source, dest, options)
    names, importance = {t.name for t in model.tensors if not t.is_mtp}, options.importance
    quantizable = {t.name for t in model.matrices}
    trunk = [tensor for tensor in draft.files[0].tensors if tensor.name in names]
    matrices = [tensor for tensor in trunk if tensor.name in quantizable]
    if costs is not None:
        weighed = objective.options_at_costs(matrices, costs, model.routing, importance)
    else:
        cache = measure.cache_path(source, importance)
        measured = measure.measure_errors(
            source, matrices, cache, importance=importance, threads=threads, progress=progress, compiling=compiling
        )
        weighed = objective.weigh_options(matrices, measured, model.routing, importance)
    priced = {item.name: item for item in weighed}
    # A tensor whose type a rule fixes is an item all the same: its bytes are paid from the same budget.
    floors = {t.name: options.recipe.floor_type(t, model.facts) for t in _undecided_tensors(model, options)}
    items = [
        _limit_to_floor(priced[t.name], floors[t.name], t)
        if t.name in floors
        else _as_fixed(t, priced.get(t.name), objective.read_share(t, model.routing))
        for t in trunk
    ]
    return PricedTrunk(items, draft, sum(tensor.n_bytes for tensor in trunk), in_nats=costs is not None)


def _limit_to_floor(item: TensorOptions, floor: GGMLQuantizationType | None, tensor: PlannedTensor) -> TensorOptions:
    """The item without types of fewer bits than the floor; with the floor alone if that leaves none."""
    if floor is None:
        return item
    least = bits_per_weight(floor)
    options = tuple(o for o in item.options if bits_per_weight(o.ggml_type) >= least)
    return replace(item, options=options or (TypeOption(floor, tensor.bytes_as(floor), 0.0),))


def _as_fixed(tensor: PlannedTensor, priced: TensorOptions | None, read_share: float) -> TensorOptions:
    """A tensor whose type is fixed, as an item with one option. It costs what was measured, or 0 where nothing was."""
    options = priced.options if priced is not None else ()
    cost = next((option.cost for option in options if option.ggml_type == tensor.ggml_type), 0.0)
    return TensorOptions(tensor.name, (TypeOption(tensor.ggml_type, tensor.n_bytes, cost),), read_share)


def _undecided_tensors(model: Inventory, options: Options) -> list[TensorSpec]:
    """The trunk's tensors whose types no rule fixes, so that the budget chooses them."""
    return [tensor for tensor in model.matrices if options.recipe.fixed_type(tensor, model.facts) is None]


def _q8_0(shape: tuple[int, ...]) -> GGMLQuantizationType:
    return fitting_type(GGMLQuantizationType.Q8_0, shape[-1])
