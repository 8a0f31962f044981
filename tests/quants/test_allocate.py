"""The allocator against brute force, the dual bound, and its own promises, on small made-up instances."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st

from stepgguf.errors import DoesNotFit
from stepgguf.quants.allocate import Allocation, SpentBytes, TensorOptions, TypeOption, allocate_bytes, trace_frontier

pytestmark = pytest.mark.slow

KINDS = list(GGMLQuantizationType)
# Costs are whole numbers and shares powers of two, so that all sums here are exact.
OPTIONS = st.lists(st.tuples(st.integers(1, 60), st.integers(0, 200)), min_size=1, max_size=5)
SHARES = st.sampled_from([1.0, 0.25, 1 / 32, 0.0])
ITEMS = st.lists(st.tuples(OPTIONS, SHARES), min_size=1, max_size=5).map(
    lambda items: [item(f"t{i}", options, share) for i, (options, share) in enumerate(items)]
)
examples = settings(max_examples=200, deadline=None)


def item(name: str, options: Sequence[tuple[int, float]], share: float = 1.0) -> TensorOptions:
    return TensorOptions(
        name, tuple(TypeOption(kind, *option) for kind, option in zip(KINDS, options, strict=False)), share
    )


def point(items: Sequence[TensorOptions], options: Sequence[TypeOption]) -> SpentBytes:
    return SpentBytes(
        sum(o.n_bytes for o in options),
        sum(o.n_bytes * i.read_share for o, i in zip(options, items, strict=True)),
        sum(o.cost for o in options),
    )


def every(items: Sequence[TensorOptions]) -> Iterator[SpentBytes]:
    return (point(items, options) for options in itertools.product(*(i.options for i in items)))


def smallest(items: Sequence[TensorOptions]) -> tuple[float, float]:
    """Bytes and bytes read of the smallest allocation."""
    return tuple(
        sum(min(o.n_bytes for o in i.options) * (i.read_share if read else 1) for i in items) for read in (False, True)
    )  # type: ignore[return-value]


def steps(items: Sequence[TensorOptions]) -> list[float]:
    """What each step along each item's lower convex hull saves."""
    return [b - a for i in items for a, b in itertools.pairwise(sorted(p.cost for p in trace_frontier([i])))]


def dual_bound(items: Sequence[TensorOptions], max_bytes: float) -> float:
    """What no choice of fractions of options can go below: the Lagrangian dual at its best price."""
    prices = {0.0} | {
        (a.cost - b.cost) / (b.n_bytes - a.n_bytes)
        for i in items
        for a, b in itertools.permutations(i.options, 2)
        if b.n_bytes > a.n_bytes and a.cost > b.cost
    }
    return max(sum(min(o.cost + p * o.n_bytes for o in i.options) for i in items) - p * max_bytes for p in prices)


def check(items: Sequence[TensorOptions], found: Allocation, max_bytes: float, max_read: float = math.inf) -> None:
    """Options are the items' own, totals are theirs, budgets are kept, and no one item can be improved within them."""
    assert all(option in i.options for option, i in zip(found.options, items, strict=True))
    assert found.spent == point(items, found.options)
    assert found.spent.n_bytes <= max_bytes
    assert found.spent.read_bytes <= max_read
    for i, option in zip(items, found.options, strict=True):
        for other in i.options:
            more = other.n_bytes - option.n_bytes
            fits = found.spent.n_bytes + more <= max_bytes and found.spent.read_bytes + more * i.read_share <= max_read
            assert not (fits and other.cost < option.cost), (i.name, option, other)


@pytest.mark.slow
@examples
@given(ITEMS, st.integers(0, 150))
def test_the_gap_to_the_optimum_is_less_than_one_step_of_one_tensor(items: list[TensorOptions], room: int) -> None:
    budget = smallest(items)[0] + room
    found = allocate_bytes(items, max_bytes=budget)
    check(items, found, budget)
    optimum = min(p.cost for p in every(items) if p.n_bytes <= budget)
    bound = dual_bound(items, budget)
    assert bound <= optimum + 1e-9
    assert optimum <= found.spent.cost
    gap = found.spent.cost - bound
    assert gap <= 1e-9 or gap < max(steps(items))


@pytest.mark.slow
@examples
@given(ITEMS, st.integers(0, 150), st.integers(0, 60))
def test_a_larger_budget_never_costs_more(items: list[TensorOptions], room: int, more: int) -> None:
    budget = smallest(items)[0] + room
    assert (
        allocate_bytes(items, max_bytes=budget + more).spent.cost <= allocate_bytes(items, max_bytes=budget).spent.cost
    )


@examples
@given(ITEMS, st.integers(0, 80), st.integers(0, 60))
def test_a_larger_read_budget_never_costs_more(items: list[TensorOptions], room: int, more: int) -> None:
    budget = smallest(items)[1] + room
    assert (
        allocate_bytes(items, max_read_bytes=budget + more).spent.cost
        <= allocate_bytes(items, max_read_bytes=budget).spent.cost
    )


@examples
@given(ITEMS, st.integers(0, 150), st.integers(0, 80))
def test_with_both_budgets_the_gap_is_at_most_two_steps(items: list[TensorOptions], room: int, read_room: int) -> None:
    max_bytes, max_read = smallest(items)[0] + room, smallest(items)[1] + read_room
    found = allocate_bytes(items, max_bytes=max_bytes, max_read_bytes=max_read)
    check(items, found, max_bytes, max_read)
    optimum = min(p.cost for p in every(items) if p.n_bytes <= max_bytes and p.read_bytes <= max_read)
    assert optimum <= found.spent.cost <= optimum + sum(sorted(steps(items))[-2:])


def model_like() -> list[TensorOptions]:
    """40 layers: a dense tensor, read always, and a routed one of 20 times its bytes, read with probability 1/36.

    Errors fall with bits as 4^-bits, and early layers weigh more.
    """
    bits, found = (2.6, 3.4, 4.5, 5.5, 6.6, 8.5), []
    for layer in range(40):
        for name, size, share in (("attn", 10_000, 1.0), ("exps", 200_000, 1 / 36)):
            options = [(round(size * b), 4**-b / (layer + 2)) for b in bits]
            found.append(item(f"{layer}.{name}", options, share))
    return found


@pytest.mark.parametrize(("memory", "read"), [(0.1, 0.2), (0.2, 0.3), (0.3, 0.4), (0.4, 0.5), (0.6, 0.7)])
def test_where_both_budgets_bind_the_gap_to_the_dual_bound_is_two_steps(memory: float, read: float) -> None:
    items = model_like()
    costs = np.array([[o.cost for o in i.options] for i in items])
    sizes = np.array([[o.n_bytes for o in i.options] for i in items])
    reads = sizes * np.array([[i.read_share] for i in items])
    max_bytes, max_read = (
        v[:, 0].sum() + share * (v[:, -1] - v[:, 0]).sum() for v, share in ((sizes, memory), (reads, read))
    )
    # Either budget alone would be spent otherwise: both matter here.
    assert allocate_bytes(items, max_bytes=max_bytes).spent.read_bytes > max_read
    assert allocate_bytes(items, max_read_bytes=max_read).spent.n_bytes > max_bytes
    found = allocate_bytes(items, max_bytes=max_bytes, max_read_bytes=max_read)
    # Any two prices give a lower bound; the grid need not hold the best ones.
    bound = max(
        float((costs + p * sizes + q * reads).min(axis=1).sum() - p * max_bytes - q * max_read)
        for p in np.geomspace(1e-12, 1e-8, 60)
        for q in np.geomspace(1e-11, 1e-6, 60)
    )
    # A linear programme with two budgets splits at most two items between neighbouring options.
    at = [i.options.index(option) for i, option in zip(items, found.options, strict=True)]
    following = sorted(costs[n, j] - costs[n, min(j + 1, 5)] for n, j in enumerate(at))
    assert 0 <= found.spent.cost - bound <= sum(following[-2:])


def test_the_two_prices_trade_dense_bytes_for_routed_ones() -> None:
    # The dense tensor's second step saves more for its bytes; but its bytes are read for each token.
    dense = item("attn_q", [(10, 100.0), (20, 40.0), (30, 10.0)])
    routed = item("ffn_up_exps", [(10, 100.0), (20, 60.0), (30, 40.0)], share=1 / 36)
    assert [o.n_bytes for o in allocate_bytes([dense, routed], max_bytes=40).options] == [20, 20]
    assert [o.n_bytes for o in allocate_bytes([dense, routed], max_bytes=50).options] == [30, 20]
    assert [o.n_bytes for o in allocate_bytes([dense, routed], max_bytes=50, max_read_bytes=21).options] == [20, 30]
    assert [o.n_bytes for o in allocate_bytes([dense, routed], max_bytes=60, max_read_bytes=21).options] == [20, 30]
    assert [o.n_bytes for o in allocate_bytes([dense, routed], max_read_bytes=11).options] == [10, 30]


def test_without_a_budget_every_tensor_gets_its_best() -> None:
    items = [item("a", [(10, 5.0), (20, 1.0), (30, 3.0)]), item("b", [(10, 5.0)])]
    assert [o.n_bytes for o in allocate_bytes(items).options] == [20, 10]


def test_options_above_the_hull_fill_what_room_is_left() -> None:
    # The hull goes from 10 to 30 bytes; with 20 the option above it is the best there is.
    a = item("a", [(10, 100.0), (20, 80.0), (30, 10.0)])
    assert [o.n_bytes for o in allocate_bytes([a], max_bytes=29).options] == [20]


@examples
@given(ITEMS)
def test_the_frontier_is_what_is_allocated_at_each_of_its_sizes(items: list[TensorOptions]) -> None:
    points = trace_frontier(items)
    assert points[0].n_bytes == smallest(items)[0]
    assert points[-1].cost == min(p.cost for p in every(items))
    for p in points:
        assert allocate_bytes(items, max_bytes=p.n_bytes).spent == p
    rates = [(a.cost - b.cost) / (b.n_bytes - a.n_bytes) for a, b in itertools.pairwise(points)]
    assert all(rate > 0 for rate in rates)
    assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(rates))


@pytest.mark.parametrize("budget", range(107, 140))
def test_of_two_steps_at_one_rate_the_larger_is_first_whatever_the_budget(budget: int) -> None:
    items = [item("a", [(62, 72), (74, 0)]), item("b", [(45, 60), (55, 0)])]
    found = allocate_bytes(items, max_bytes=budget).spent
    assert found.cost == (132 if budget < 117 else 72 if budget < 119 else 60 if budget < 129 else 0)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (
            {"max_bytes": 29},
            r"with the smallest types the tensors take 30 bytes \(30 B\); the budget is 29 \(29 B\)",
        ),
        (
            {"max_read_bytes": 12},
            r"with the smallest types one token reads 15 bytes \(15 B\); the budget is 12 \(12 B\)",
        ),
    ],
)
def test_a_budget_below_the_smallest_types_is_refused_with_both_numbers(budget: dict[str, int], message: str) -> None:
    items = [item("dense", [(10, 5.0), (20, 1.0)]), item("routed", [(20, 5.0), (40, 1.0)], share=0.25)]
    assert allocate_bytes(items, max_bytes=30, max_read_bytes=15).spent == SpentBytes(30, 15.0, 10.0)
    with pytest.raises(DoesNotFit, match=message):
        allocate_bytes(items, **budget)
