"""ggml's searches for a scale: least squares at each point of a grid, the best point wins (ggml-quants.c).

    search_scale_and_minimum    x[i] ~ scale * level[i] + minimum      level >= 0
    search_scale                x[i] ~ scale * (level[i] - half)
    quantize_positive           x[i] ~ scale * level[i]                x, level >= 0

Each lane searches for a row of its own, in ggml's order of operations. What ggml copies at each improvement, the
levels, is computed once at the end from the best point.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from stepgguf.quants.lanes.blocks import extreme
from stepgguf.quants.lanes.compile import inlined
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

EPS = 1e-15  # GROUP_MAX_EPS: a block of smaller values is zero


def from_lowest(first: float, step: float, n: int, highest: int) -> Any:
    """The numerators of a grid's inverse scales: highest + first + step * i, in float32 as C adds them."""
    return (np.float32(first) + np.float32(step) * np.arange(n, dtype=np.float32)) + np.float32(highest)


def around_zero(half: int) -> Any:
    """The numerators of a grid's inverse scales: -half, then -(half + i / 10) for i = -9..9 without 0."""
    steps = np.array([0, *range(-9, 0), *range(1, 10)], np.float32)
    return -(np.float32(half) + np.float32(0.1) * steps)


@inlined
def search_scale_and_minimum(
    x: Any, w: Any, levels: Any, aux: Any, first: int, n: int, highest: int, grid: Any, by_size: bool
) -> Any:
    """make_qkx2_quants, make_qkx3_quants: (scale, minimum <= 0) of the n values from vector `first` of x on.

    Their levels go to the same places of `levels`. w [n]: weights. grid: from_lowest(...). aux [n]: scratch.
    by_size: the error is |difference|, not its square.
    """
    zero, bottom, top = floats(0.0), ints(0), ints(highest)
    low = load(x, first)
    high = low
    sum_w = load(w, 0)
    sum_x = sum_w * low
    for i in range(1, n):
        v, weight = load(x, first + i), load(w, i)
        low = where(v < low, v, low)
        high = where(v > high, v, high)
        sum_w = sum_w + weight
        sum_x = sum_x + weight * v
    low = where(low > zero, zero, low)
    is_flat = high <= low
    inverse = floats(highest) / (high - low)
    scale = floats(1.0) / inverse
    best_inverse, best_low = inverse, low
    best = zero
    for i in range(n):
        v = load(x, first + i)
        level = to_float(clamp(nearest_int(inverse * (v - low)), bottom, top))
        difference = scale * level + low - v
        difference = absolute(difference) if by_size else difference * difference
        best = best + load(w, i) * difference
    for step in range(len(grid)):
        inverse = floats(grid[step]) / (high - low)
        sum_l, sum_l2, sum_xl = zero, zero, zero
        for i in range(n):
            v = load(x, first + i)
            level = to_float(clamp(nearest_int(inverse * (v - low)), bottom, top))
            store(aux, i, level)
            weighted = load(w, i) * level
            sum_l = sum_l + weighted
            sum_l2 = sum_l2 + weighted * level
            sum_xl = sum_xl + weighted * v
        determinant = sum_w * sum_l2 - sum_l * sum_l
        this_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
        this_low = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
        is_positive = this_low > zero
        this_scale = where(is_positive, sum_xl / sum_l2, this_scale)
        this_low = where(is_positive, zero, this_low)
        error = zero
        for i in range(n):
            difference = this_scale * load(aux, i) + this_low - load(x, first + i)
            difference = absolute(difference) if by_size else difference * difference
            error = error + load(w, i) * difference
        is_better = (determinant > zero) & (error < best)
        best = where(is_better, error, best)
        best_inverse = where(is_better, inverse, best_inverse)
        best_low = where(is_better, low, best_low)
        scale = where(is_better, this_scale, scale)
        low = where(is_better, this_low, low)  # ggml's next grid points start from the new minimum
    for i in range(n):
        level = clamp(nearest_int(best_inverse * (load(x, first + i) - best_low)), bottom, top)
        store_bytes(levels, first + i, where(is_flat, bottom, level))
    return where(is_flat, zero, scale), low


@inlined
def search_scale(x: Any, w: Any, levels: Any, first: int, n: int, half: int, grid: Any) -> Any:
    """make_qx_quants: the scale of the n values from vector `first` of x on; level `half` stands for 0.

    Their levels go to the same places of `levels`; ggml makes them all 0 where every value is below EPS.
    w [n]: weights. grid: around_zero(half).
    """
    zero = floats(0.0)
    largest = extreme(x, first, n)
    is_zero = absolute(largest) < floats(EPS)
    best_inverse = floats(grid[0]) / largest
    sum_xl, sum_l2 = _fit(x, w, first, n, best_inverse, half)
    scale = where(sum_l2 != zero, sum_xl / sum_l2, zero)
    best = scale * sum_xl
    for step in range(1, len(grid)):
        inverse = floats(grid[step]) / largest
        sum_xl, sum_l2 = _fit(x, w, first, n, inverse, half)
        is_better = (sum_l2 > zero) & (sum_xl * sum_xl > best * sum_l2)
        best_inverse = where(is_better, inverse, best_inverse)
        scale = where(is_better, sum_xl / sum_l2, scale)
        best = where(is_better, scale * sum_xl, best)
    for i in range(first, first + n):
        level = clamp(nearest_int(best_inverse * load(x, i)), ints(-half), ints(half - 1)) + ints(half)
        store_bytes(levels, i, where(is_zero, ints(0), level))
    return where(is_zero, zero, scale)


@inlined
def _fit(x: Any, w: Any, first: int, n: int, inverse: Any, half: int) -> Any:
    """Sums of weight * x * level and weight * level^2 for the n values from vector `first` of x on."""
    sum_xl, sum_l2 = floats(0.0), floats(0.0)
    for i in range(n):
        v, weight = load(x, first + i), load(w, i)
        level = to_float(clamp(nearest_int(inverse * v), ints(-half), ints(half - 1)))
        sum_xl = sum_xl + weight * v * level
        sum_l2 = sum_l2 + weight * level * level
    return sum_xl, sum_l2


@inlined
def quantize_positive(values: Any, weights: Any, levels: Any, n: int, highest: int) -> Any:
    """make_qp_quants: the scale of n values >= 0 with weights, their levels [n] as i32."""
    zero, top = floats(0.0), ints(highest)
    high = zero
    for i in range(n):
        v = load(values, i)
        high = where(high > v, high, v)
    is_zero = high < floats(EPS)
    inverse = floats(highest) / high
    scale = floats(1.0) / inverse
    best = zero
    for i in range(n):
        v = load(values, i)
        difference = v - scale * to_float(nearest_int(inverse * v) & ints(0xFF))
        best = best + load(weights, i) * difference * difference
    for step in (-4, -3, -2, -1, 1, 2, 3, 4):
        this_inverse = (floats(0.1) * floats(step) + floats(highest)) / high
        this_scale = floats(1.0) / this_inverse
        error = zero
        for i in range(n):
            v = load(values, i)
            level = nearest_int(this_inverse * v)
            difference = v - this_scale * to_float(where(level > top, top, level))
            error = error + load(weights, i) * difference * difference
        is_better = error < best
        best = where(is_better, error, best)
        inverse = where(is_better, this_inverse, inverse)
    sum_lx, sum_l2 = zero, zero
    for i in range(n):
        v, weight = load(values, i), load(weights, i)
        level = nearest_int(inverse * v)
        level = where(level > top, top, level)
        store(levels, i, level & ints(0xFF))
        sum_lx = sum_lx + weight * v * to_float(level)
        sum_l2 = sum_l2 + weight * to_float(level) * to_float(level)
    for _ in range(5):
        has_changed = zero < zero
        for i in range(n):
            v, weight, old = load(values, i), load(weights, i), load(levels, i)
            lx = sum_lx - weight * v * to_float(old)
            l2 = sum_l2 - weight * to_float(old) * to_float(old)
            level = nearest_int(v * l2 / lx)
            level = where(level > top, top, level)
            may = (lx > zero) & (l2 > zero) & (level != old)
            lx = lx + weight * v * to_float(level)
            l2 = l2 + weight * to_float(level) * to_float(level)
            is_better = may & (lx * lx * sum_l2 > sum_lx * sum_lx * l2)
            store(levels, i, where(is_better, level & ints(0xFF), old))
            sum_lx = where(is_better, lx, sum_lx)
            sum_l2 = where(is_better, l2, sum_l2)
            has_changed = has_changed | is_better
        if not any_lane(has_changed):
            break
    for i in range(n):
        store(levels, i, where(is_zero, ints(0), load(levels, i)))
    return where(is_zero, zero, where(sum_l2 > zero, sum_lx / sum_l2, zero))
