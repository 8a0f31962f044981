"""Spend a byte budget over tensors: for each one of its types, so that the sum of predicted costs is least.

A budget may limit the bytes held in memory, the bytes read for each token (they set the speed), or both. A routed
expert's byte is held always and read with probability n_used / n_expert; a dense byte is read always. So each byte has
two prices, and a step from one type of a tensor to another is worth

    rate = cost saved / (bytes added * price of the tensor's bytes)     price = (1 - mu) / memory + mu * share / read

All tensors start at their smallest type; then the steepest step that still fits is taken, until none fits. From any
option the steepest step leads to the next corner of the tensor's lower convex hull, so until the first step that does
not fit this is the Lagrangian solution for that rate, the optimum of its size, and the gap to the continuous optimum is
less than what that one step would have saved. The rest fills the room that is left.

With one budget, more of it never costs more: rates only fall along the way, so where a larger budget first takes a
step that a smaller one has no room for, that step saves more than the smaller one can still save at all. With both, mu
is searched by bisection until both budgets run out together, or one of them has slack. The gap is then at most two
steps, and that is also the most by which a larger budget can cost more.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from gguf import GGMLQuantizationType

from stepgguf.errors import DoesNotFit
from stepgguf.files.byte_sizes import readable_size

# Halvings of mu's interval. The order of a thousand steps no longer changes well before that.
_BISECTIONS = 30


@dataclass(frozen=True, slots=True)
class TypeOption:
    """One type that a tensor can have. `cost` is whatever is minimised, the same unit for all tensors."""

    ggml_type: GGMLQuantizationType
    n_bytes: int
    cost: float


@dataclass(frozen=True, slots=True)
class TensorOptions:
    """One tensor. `read_share`: how often each of its bytes is read for one token. One option alone is a fixed type."""

    name: str
    options: tuple[TypeOption, ...]
    read_share: float


@dataclass(frozen=True, slots=True)
class SpentBytes:
    """What an allocation takes, and what it costs in all. `read_bytes` are those of one token."""

    n_bytes: int
    read_bytes: float
    cost: float


@dataclass(frozen=True, slots=True)
class Allocation:
    """One option for each item, in the items' order."""

    options: tuple[TypeOption, ...]
    spent: SpentBytes


def allocate_bytes(
    items: Sequence[TensorOptions], *, max_bytes: float = math.inf, max_read_bytes: float = math.inf
) -> Allocation:
    """The cheapest options within both budgets. DoesNotFit if the smallest options are too large."""
    _check_fits(items, max_bytes, max_read_bytes)
    low, high = 0.0, 1.0
    memory, read = (_walk_to_end(items, max_bytes, max_read_bytes, mu) for mu in (low, high))
    if memory.refused_by != "read":
        return memory.allocation
    if read.refused_by != "memory":
        return read.allocation
    best = min(memory, read, key=lambda walk: walk.cost)
    for _ in range(_BISECTIONS):
        mu = (low + high) / 2
        walk = _walk_to_end(items, max_bytes, max_read_bytes, mu)
        best = min(best, walk, key=lambda walk: walk.cost)
        low, high = (low, mu) if walk.refused_by == "memory" else (mu, high)
    return best.allocation


def trace_frontier(items: Sequence[TensorOptions]) -> list[SpentBytes]:
    """Every point on the way from the smallest types to the best, each the least cost for its bytes in memory."""
    all_largest = sum(max(option.n_bytes for option in item.options) for item in items)
    walk = _Walk(items, all_largest, math.inf, 0.0)
    points = [walk.spent]
    while walk.step():
        points.append(walk.spent)
    return points


def _check_fits(items: Sequence[TensorOptions], max_bytes: float, max_read_bytes: float) -> None:
    smallest = _Walk(items, max_bytes, max_read_bytes, 0.0).spent
    for what, least, most in (
        ("the tensors take", smallest.n_bytes, max_bytes),
        ("one token reads", smallest.read_bytes, max_read_bytes),
    ):
        if least > most:
            raise DoesNotFit(
                f"with the smallest types {what} {math.ceil(least):,} bytes ({readable_size(least)}); "
                f"the budget is {math.floor(most):,} ({readable_size(most)})",
                hint="Give a larger budget, or allow smaller types (most of those below Q3_K need an imatrix).",
            )


def _walk_to_end(items: Sequence[TensorOptions], max_bytes: float, max_read_bytes: float, mu: float) -> _Walk:
    walk = _Walk(items, max_bytes, max_read_bytes, mu)
    while walk.step():
        pass
    return walk


class _Walk:
    """From the smallest options, the steepest step that fits, again and again."""

    def __init__(self, items: Sequence[TensorOptions], max_bytes: float, max_read_bytes: float, mu: float) -> None:
        self.items, self.max_bytes, self.max_read_bytes = items, max_bytes, max_read_bytes
        # An unlimited budget has no price. Where neither has one, any order will do: every step fits.
        memory, read = (1 - mu) / max(1, max_bytes), mu / max(1, max_read_bytes)
        # One price alone is 1, so that equal rates are equal in floats too, and ties do not depend on the budget.
        unit = max(memory, read) or 1.0
        self.prices = [memory / unit + read / unit * item.read_share for item in items]
        self.chosen = [min(item.options, key=lambda o: (o.n_bytes, o.cost)) for item in items]
        self.n_bytes = sum(option.n_bytes for option in self.chosen)
        self.read_bytes = sum(o.n_bytes * item.read_share for o, item in zip(self.chosen, items, strict=True))
        self.refused_by: str | None = None  # the budget that the first step which did not fit would have broken
        self._steps: list[tuple[float, float, int, TypeOption]] = []  # a heap: -rate, -saving, item, where it leads
        for index in range(len(items)):
            self._push_next_step(index)

    @property
    def cost(self) -> float:
        return math.fsum(option.cost for option in self.chosen)

    @property
    def spent(self) -> SpentBytes:
        return SpentBytes(self.n_bytes, self.read_bytes, self.cost)

    @property
    def allocation(self) -> Allocation:
        return Allocation(tuple(self.chosen), self.spent)

    def step(self) -> bool:
        """Take the steepest step that fits. False if there is none."""
        while self._steps:
            *_, index, option = heapq.heappop(self._steps)
            broken = self._broken_budget(index, option)
            if broken is None:
                added = option.n_bytes - self.chosen[index].n_bytes
                self.chosen[index] = option
                self.n_bytes += added
                self.read_bytes += added * self.items[index].read_share
            self.refused_by = self.refused_by or broken
            self._push_next_step(index)
            if broken is None:
                return True
        return False

    def _broken_budget(self, index: int, option: TypeOption) -> str | None:
        """The budget that does not hold this step. Room only shrinks, so what does not fit now never will."""
        added = option.n_bytes - self.chosen[index].n_bytes
        if self.n_bytes + added > self.max_bytes:
            return "memory"
        return "read" if self.read_bytes + added * self.items[index].read_share > self.max_read_bytes else None

    def _push_next_step(self, index: int) -> None:
        """Put an item's steepest step on the heap: before the first refusal any step, then one that fits."""
        now, price = self.chosen[index], self.prices[index]
        steps = []
        for option in self.items[index].options:
            added, saving = option.n_bytes - now.n_bytes, now.cost - option.cost
            if added > 0 and saving > 0 and not (self.refused_by and self._broken_budget(index, option)):
                rate = saving / (added * price) if price else math.inf
                steps.append((-rate, -saving, index, option))
        if steps:
            # One step of an item is on the heap at a time: its number decides, and options are never compared.
            heapq.heappush(self._steps, min(steps, key=lambda step: step[:3]))
