"""What a load has not been told, chosen from what is free now: where tensors go, and how long the context is.

    cards    experts in RAM and layers on each card by placement.py, on the engine's devices with their free memory
    --ctx auto    the longest context that fits, at most the model's own

What is set stays as it is. Where the engine sees no cards with memory of their own there is nothing to place.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from stepgguf.fit.machine import SHARED_MEMORY, Machine
from stepgguf.fit.memory import (
    ContextParams,
    MemoryBudget,
    card_budgets,
    free_on_cards,
    longest_context,
    memory_budget,
    memory_need,
)
from stepgguf.fit.model_file import ModelFile
from stepgguf.fit.placement import ModelParts, PlacedModel, place_somehow, weight_parts, with_context
from stepgguf.runtime.llama_build import Gpu, LlamaBuild


@dataclass(frozen=True, slots=True)
class Room:
    """Bytes that there are for a model: on each card with memory of its own; in RAM beside cards, or else where the
    model runs; and in all, for what is beside the model too."""

    cards: tuple[int, ...]
    ram: int
    total: int

    def place(self, model: ModelFile, context: ContextParams) -> PlacedModel | None:
        """Where a model goes on cards and beside them, by what the context's placement says; None if it does not fit.

        Cards that share each matrix count as one.
        """
        parts, wish = _parts(model, context), context.placement
        if wish.split_mode not in ("row", "tensor"):
            return place_somehow(parts, self.cards, self.ram, wish)
        placed = place_somehow(parts, (sum(self.cards),), self.ram, replace(wish, tensor_split=None))
        return placed and replace(placed, placement=replace(placed.placement, tensor_split=wish.tensor_split))

    def fits(self, model: ModelFile, context: ContextParams) -> bool:
        """Whether a model finds room, with all that running it takes."""
        if self.cards:
            return self.place(model, context) is not None
        needed = memory_need(model.footprint, context)
        return needed.device <= self.ram and needed.total <= self.total

    def longest_context(self, model: ModelFile, context: ContextParams) -> int | None:
        """The longest context with which it does; None if there is none."""
        return longest_context(
            model.footprint.n_ctx_train, lambda n_ctx: self.fits(model, replace(context, n_ctx=n_ctx))
        )


@dataclass(frozen=True, slots=True)
class Choice:
    """How a model is loaded. words: what was chosen, for people; empty if nothing had to be."""

    context: ContextParams
    words: str = ""


def engine_budget(machine: Machine, build: LlamaBuild | None) -> MemoryBudget:
    """The memory of what the engine uses of a machine. build None: nobody knows, so the machine's own figures count."""
    if machine.kind == "gpu" and build is not None and not build.gpus:
        machine = replace(machine, gpus=())  # this engine does not use them
    return memory_budget(machine, build.gpus if build else ())


def free_room(machine: Machine, build: LlamaBuild | None) -> Room:
    """What is free now."""
    cards, have = _cards(machine, build), engine_budget(machine, build)
    if not cards:
        return Room((), have.free, have.ceiling)
    in_ram = have.ceiling - have.limit
    return Room(free_on_cards(cards), min(in_ram, machine.ram_available or in_ram), have.ceiling)


def whole_room(machine: Machine, build: LlamaBuild | None) -> Room:
    """What there is when nothing else runs."""
    cards, have = _cards(machine, build), engine_budget(machine, build)
    if not cards:
        return Room((), have.limit, have.ceiling)
    return Room(card_budgets(cards), have.ceiling - have.limit, have.ceiling)


def _cards(machine: Machine, build: LlamaBuild | None) -> tuple[Gpu, ...]:
    """The GPUs with memory of their own that the engine uses."""
    if machine.kind in SHARED_MEMORY:
        return ()
    return tuple(gpu for gpu in (machine.gpus if build is None else build.gpus) if gpu.total)


def choose(
    machine: Machine, build: LlamaBuild | None, model: ModelFile, context: ContextParams, *, longest: bool
) -> Choice:
    """Choose what the context's placement leaves open, and with `longest` the context's length.

    What does not fit is left as it is: check_memory says why.
    """
    if not machine.ram:
        return Choice(context)
    room = free_room(machine, build)
    if longest:
        context = replace(context, n_ctx=room.longest_context(model, context) or context.n_ctx)
    tokens = f"{context.n_ctx:,} tokens of context"
    if not room.cards:
        return Choice(context, tokens * longest)
    placed = room.place(model, context)
    if placed is None:
        return Choice(context)
    words = ", ".join((*describe(placed, model), tokens))
    return Choice(replace(context, placement=placed.placement), words)


def describe(placed: PlacedModel, model: ModelFile) -> Iterator[str]:
    """Where a model is, part by part."""
    n_layers = len(model.footprint.trunk_layers)
    if placed.n_cpu_moe:
        yield f"experts of {min(placed.n_cpu_moe, n_layers)} of {n_layers} layers in RAM"
    if placed.n_left:
        yield f"{min(placed.n_left, n_layers)} whole layers in RAM"
    if len(placed.counts) > 1:
        yield f"{'/'.join(map(str, placed.counts))} layers on the {len(placed.counts)} cards"
    elif not placed.n_left:
        yield "all layers on the card"


def _parts(model: ModelFile, context: ContextParams) -> ModelParts:
    """The model's bytes as they are placed: the MTP blocks may be in a file of their own."""
    sizes, footprint = model.inventory.own_sizes(mtp=False), model.footprint
    assert sizes is not None  # a GGUF has types
    n_mtp = len(footprint.mtp_layers) if context.mtp else 0
    mtp_bytes = max(0, footprint.weights - sizes.total) if n_mtp else 0
    parts = weight_parts(replace(sizes, mtp=mtp_bytes), n_mtp, context.placement.overrides)
    return with_context(parts, footprint, context)
