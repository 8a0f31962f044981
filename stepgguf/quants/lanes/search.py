"""ggml's searches for a scale: least squares at each of a row of trial scales, the best wins (ggml-quants.c).

    make_minimum_search     x[i] ~ scale * level[i] + minimum      level >= 0
    make_scale_search       x[i] ~ scale * (level[i] - half)
    quantize_positive       x[i] ~ scale * level[i]                x, level >= 0

Each lane searches for a row of its own, in ggml's order of operations. What ggml copies at each improvement, the
levels, is computed once at the end from the best trial. A trial is an inverse scale: a numerator from a list that is
the same for all, divided by the largest value, or by the distance between the lowest and the highest.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from stepgguf.quants.lanes.blocks import highest_of, lowest_and_highest, signed_extreme
from stepgguf.quants.lanes.compile import inlined
from stepgguf.quants.lanes.operands import ByteTile, F32Lanes, F32Tile, I32Lanes, I32Tile, Mask
from stepgguf.quants.lanes.rounding import clamp, nearest_int
from stepgguf.quants.lanes.vector import (
    absolute,
    any_lane,
    floats,
    ints,
    load,
    store,
    store_bytes,
    to_float,
    where,
)

GROUP_MAX_EPS = 1e-15  # ggml's: a group of smaller values is zero


@inlined
def improve_scale(
    sum_xl: F32Lanes, sum_l2: F32Lanes, scale: F32Lanes, best: F32Lanes
) -> tuple[Mask, F32Lanes, F32Lanes]:
    """Where a trial is better, and the scale and the best after it.

    sum_xl, sum_l2: the trial's sums of weight * value * level and weight * level^2. Least squares make the scale
    sum_xl / sum_l2, which takes sum_xl^2 / sum_l2 off the error; `best` is the most taken off so far. Compared without
    a division, as ggml does.
    """
    is_better = (sum_l2 > floats(0.0)) & (sum_xl * sum_xl > best * sum_l2)
    scale = where(is_better, sum_xl / sum_l2, scale)
    return is_better, scale, where(is_better, scale * sum_xl, best)


# scale and minimum ----------------------------------------------------------------------------------------------

# search(x, w, levels, tried, first, n) -> (scale, minimum), as make_minimum_search says.
MinimumSearch = Callable[[F32Tile, F32Tile, ByteTile, F32Tile, int, int], tuple[F32Lanes, F32Lanes]]


def make_minimum_search(
    highest: int, lowest: float, step: float, n_trials: int, by_size: bool = False
) -> MinimumSearch:
    """make_qkx2_quants, make_qkx3_quants, as a part of kernels: search(x, w, levels, tried, first, n).

    It gives (scale, minimum <= 0) of the n values from vector `first` of x on; their levels, from 0 to `highest`, go to
    the same places of `levels`. w [n]: weights. tried [n]: scratch.

    lowest, step, n_trials  of the numerators: highest + lowest, then n_trials - 1 times a step more (rmin, rdelta and
                            nstep + 1)
    by_size                 the error is |difference|, not its square (use_mad)
    """
    numerators = _numerators(highest, lowest, step, n_trials)

    @inlined
    def loss(difference: F32Lanes) -> F32Lanes:
        return absolute(difference) if by_size else difference * difference

    @inlined
    def level_of(v: F32Lanes, inverse: F32Lanes, low: F32Lanes) -> I32Lanes:
        return clamp(nearest_int(inverse * (v - low)), ints(0), ints(highest))

    @inlined
    def sum_products(
        x: F32Tile, w: F32Tile, first: int, n: int, inverse: F32Lanes, low: F32Lanes, tried: F32Tile
    ) -> tuple[F32Lanes, F32Lanes, F32Lanes]:
        """Sums of weight * level, weight * level^2, weight * level * value; the trial's levels go to `tried`."""
        sum_l, sum_l2, sum_xl = floats(0.0), floats(0.0), floats(0.0)
        for i in range(n):
            v = load(x, first + i)
            level = to_float(level_of(v, inverse, low))
            store(tried, i, level)
            weighted = load(w, i) * level
            sum_l = sum_l + weighted
            sum_l2 = sum_l2 + weighted * level
            sum_xl = sum_xl + weighted * v
        return sum_l, sum_l2, sum_xl

    @inlined
    def error_of(
        x: F32Tile, w: F32Tile, first: int, n: int, scale: F32Lanes, minimum: F32Lanes, tried: F32Tile
    ) -> F32Lanes:
        """What the levels in `tried` lose with this scale and minimum."""
        error = floats(0.0)
        for i in range(n):
            error = error + load(w, i) * loss(scale * load(tried, i) + minimum - load(x, first + i))
        return error

    @inlined
    def search(
        x: F32Tile, w: F32Tile, levels: ByteTile, tried: F32Tile, first: int, n: int
    ) -> tuple[F32Lanes, F32Lanes]:
        zero = floats(0.0)
        low, high = lowest_and_highest(x, first, n)
        sum_w, sum_x = _weighted_sums(x, w, first, n)
        low = where(low > zero, zero, low)
        is_flat = high <= low
        inverse = floats(highest) / (high - low)
        scale = floats(1.0) / inverse
        best_inverse, best_low, best = inverse, low, zero
        for i in range(n):
            v = load(x, first + i)
            best = best + load(w, i) * loss(scale * to_float(level_of(v, inverse, low)) + low - v)
        for trial in range(len(numerators)):
            inverse = floats(numerators[trial]) / (high - low)
            sum_l, sum_l2, sum_xl = sum_products(x, w, first, n, inverse, low, tried)
            determinant = sum_w * sum_l2 - sum_l * sum_l
            this_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
            this_low = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
            # A minimum above 0 cannot be stored: then it is 0 and the scale alone is fitted.
            is_positive = this_low > zero
            this_scale = where(is_positive, sum_xl / sum_l2, this_scale)
            this_low = where(is_positive, zero, this_low)
            error = error_of(x, w, first, n, this_scale, this_low, tried)
            is_better = (determinant > zero) & (error < best)
            best = where(is_better, error, best)
            best_inverse = where(is_better, inverse, best_inverse)
            best_low = where(is_better, low, best_low)
            scale = where(is_better, this_scale, scale)
            low = where(is_better, this_low, low)  # ggml's next trials start from the new minimum
        for i in range(n):
            level = level_of(load(x, first + i), best_inverse, best_low)
            store_bytes(levels, first + i, where(is_flat, ints(0), level))
        return where(is_flat, zero, scale), low

    return search


def _numerators(highest: int, lowest: float, step: float, n: int) -> NDArray[np.float32]:
    """highest + lowest + step * i, in float32 as C adds them."""
    offsets = np.float32(lowest) + np.float32(step) * np.arange(n, dtype=np.float32)
    numerators: NDArray[np.float32] = offsets + np.float32(highest)
    return numerators


@inlined
def _weighted_sums(x: F32Tile, w: F32Tile, first: int, n: int) -> tuple[F32Lanes, F32Lanes]:
    """The sums of the weights w [n] and of weight * value."""
    sum_w = load(w, 0)
    sum_x = sum_w * load(x, first)
    for i in range(1, n):
        sum_w = sum_w + load(w, i)
        sum_x = sum_x + load(w, i) * load(x, first + i)
    return sum_w, sum_x


# scale around zero ----------------------------------------------------------------------------------------------

# search(x, w, levels, first, n) -> scale, as make_scale_search says.
ScaleSearch = Callable[[F32Tile, F32Tile, ByteTile, int, int], F32Lanes]


def make_scale_search(half: int) -> ScaleSearch:
    """make_qx_quants, as a part of kernels: search(x, w, levels, first, n).

    It gives the scale of the n values from vector `first` of x on. Their levels go to the same places of `levels`: from
    0 to 2 * half - 1, `half` stands for 0. ggml makes them all 0 where every value is below GROUP_MAX_EPS. w [n]:
    weights.
    """
    # The extreme value first gets level 0 exactly, then up to 0.9 levels more or less, in ggml's order.
    steps = np.array([0, *range(-9, 0), *range(1, 10)], np.float32)
    numerators = -(np.float32(half) + np.float32(0.1) * steps)

    @inlined
    def level_of(v: F32Lanes, inverse: F32Lanes) -> I32Lanes:
        return clamp(nearest_int(inverse * v), ints(-half), ints(half - 1))

    @inlined
    def fit(x: F32Tile, w: F32Tile, first: int, n: int, inverse: F32Lanes) -> tuple[F32Lanes, F32Lanes]:
        """Sums of weight * x * level and weight * level^2."""
        sum_xl, sum_l2 = floats(0.0), floats(0.0)
        for i in range(n):
            v, weight = load(x, first + i), load(w, i)
            level = to_float(level_of(v, inverse))
            sum_xl = sum_xl + weight * v * level
            sum_l2 = sum_l2 + weight * level * level
        return sum_xl, sum_l2

    @inlined
    def search(x: F32Tile, w: F32Tile, levels: ByteTile, first: int, n: int) -> F32Lanes:
        zero = floats(0.0)
        extreme = signed_extreme(x, first, n)
        is_zero = absolute(extreme) < floats(GROUP_MAX_EPS)
        best_inverse = floats(numerators[0]) / extreme
        sum_xl, sum_l2 = fit(x, w, first, n, best_inverse)
        scale = where(sum_l2 != zero, sum_xl / sum_l2, zero)
        best = scale * sum_xl
        for trial in range(1, len(numerators)):
            inverse = floats(numerators[trial]) / extreme
            sum_xl, sum_l2 = fit(x, w, first, n, inverse)
            is_better, scale, best = improve_scale(sum_xl, sum_l2, scale, best)
            best_inverse = where(is_better, inverse, best_inverse)
        for i in range(first, first + n):
            level = level_of(load(x, i), best_inverse) + ints(half)
            store_bytes(levels, i, where(is_zero, ints(0), level))
        return where(is_zero, zero, scale)

    return search


# values that are not negative -----------------------------------------------------------------------------------


@inlined
def quantize_positive(values: F32Tile, weights: F32Tile, levels: I32Tile, n: int, highest: int) -> F32Lanes:
    """make_qp_quants: the scale of n values >= 0 with weights; their levels [n], from 0 to `highest`."""
    high = highest_of(values, n)
    is_zero = high < floats(GROUP_MAX_EPS)
    inverse = _best_inverse(values, weights, n, highest, high)
    sum_xl, sum_l2 = floats(0.0), floats(0.0)
    for i in range(n):
        v, weight = load(values, i), load(weights, i)
        level = _at_most(nearest_int(inverse * v), highest)
        store(levels, i, level & ints(0xFF))  # a uint8_t in ggml, but the sums are of the int
        sum_xl = sum_xl + weight * v * to_float(level)
        sum_l2 = sum_l2 + weight * to_float(level) * to_float(level)
    sum_xl, sum_l2 = _move_single_levels(values, weights, levels, n, highest, sum_xl, sum_l2)
    for i in range(n):
        store(levels, i, where(is_zero, ints(0), load(levels, i)))
    scale = where(sum_l2 > floats(0.0), sum_xl / sum_l2, floats(0.0))
    return where(is_zero, floats(0.0), scale)


@inlined
def _at_most(level: I32Lanes, highest: int) -> I32Lanes:
    """MIN(highest, level)."""
    return where(level > ints(highest), ints(highest), level)


@inlined
def _best_inverse(values: F32Tile, weights: F32Tile, n: int, highest: int, high: F32Lanes) -> F32Lanes:
    """The inverse scale of the least error: the one that puts `high` on the highest level, or one of eight around."""
    inverse = floats(highest) / high
    scale = floats(1.0) / inverse
    best = floats(0.0)
    for i in range(n):
        v = load(values, i)
        difference = v - scale * to_float(nearest_int(inverse * v) & ints(0xFF))
        best = best + load(weights, i) * difference * difference
    for step in (-4, -3, -2, -1, 1, 2, 3, 4):
        this_inverse = (floats(0.1) * floats(step) + floats(highest)) / high
        this_scale = floats(1.0) / this_inverse
        error = floats(0.0)
        for i in range(n):
            v = load(values, i)
            difference = v - this_scale * to_float(_at_most(nearest_int(this_inverse * v), highest))
            error = error + load(weights, i) * difference * difference
        is_better = error < best
        best = where(is_better, error, best)
        inverse = where(is_better, this_inverse, inverse)
    return inverse


@inlined
def _move_single_levels(
    values: F32Tile, weights: F32Tile, levels: I32Tile, n: int, highest: int, sum_xl: F32Lanes, sum_l2: F32Lanes
) -> tuple[F32Lanes, F32Lanes]:
    """Give single values another level where that alone makes the fit better, in up to five rounds; the sums then."""
    zero = floats(0.0)
    for _ in range(5):
        has_changed = zero < zero
        for i in range(n):
            v, weight, old = load(values, i), load(weights, i), load(levels, i)
            # The sums without this value, the level that the scale of all others gives it, and the sums with that.
            xl = sum_xl - weight * v * to_float(old)
            l2 = sum_l2 - weight * to_float(old) * to_float(old)
            level = _at_most(nearest_int(v * l2 / xl), highest)
            is_candidate = (xl > zero) & (l2 > zero) & (level != old)
            xl = xl + weight * v * to_float(level)
            l2 = l2 + weight * to_float(level) * to_float(level)
            is_better = is_candidate & (xl * xl * sum_l2 > sum_xl * sum_xl * l2)
            store(levels, i, where(is_better, level & ints(0xFF), old))
            sum_xl = where(is_better, xl, sum_xl)
            sum_l2 = where(is_better, l2, sum_l2)
            has_changed = has_changed | is_better
        if not any_lane(has_changed):  # no lane can change any more: its sums are what they were
            break
    return sum_xl, sum_l2
