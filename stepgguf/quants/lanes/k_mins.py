"""Q2_K, Q4_K, Q5_K: blocks of 256 whose sub-blocks have a scale and a minimum, both quantized themselves.

    x[i] ~ d * scale[j] * level[i] - dmin * min[j]        j: sub-block of i

ggml searches each sub-block's scale and minimum on a grid of scales, by least squares at each grid point, and then the
two super-block factors. Here each lane does that search for a row of its own, in ggml's order of operations
(make_qkx2_quants, make_qkx3_quants, make_qp_quants in ggml-quants.c).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from stepgguf.quants.lanes.compile import inlined
from stepgguf.quants.lanes.encoder import encoder
from stepgguf.quants.lanes.rounding import clamp, from_half, nearest_int, to_half
from stepgguf.quants.lanes.vector import (
    LANES,
    absolute,
    any_lane,
    floats,
    ints,
    load,
    load_bytes,
    sqrt,
    store,
    store_bytes,
    to_float,
    where,
)

_EPS = 1e-15  # GROUP_MAX_EPS


def _grid(first: float, step: float, n: int, highest: int) -> Any:
    """The numerators of a search's inverse scales: highest + first + step * i, in float32 as C adds them."""
    return (np.float32(first) + np.float32(step) * np.arange(n, dtype=np.float32)) + np.float32(highest)


@inlined
def _search(x: Any, w: Any, levels: Any, aux: Any, first: int, n: int, highest: int, grid: Any, by_size: bool) -> Any:
    """(scale, minus the minimum) of the n values from vector `first` of x on; levels go to `levels` from there on.

    w [n]: weights. by_size: the error is |difference|, not its square. aux [n]: scratch.
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
    return where(is_flat, zero, scale), zero - low


@inlined
def _quantize_positive(values: Any, weights: Any, levels: Any, n: int, highest: int) -> Any:
    """make_qp_quants: the factor of n values >= 0 with weights, their levels [n] as i32."""
    zero, top = floats(0.0), ints(highest)
    high = zero
    for i in range(n):
        v = load(values, i)
        high = where(high > v, high, v)
    is_zero = high < floats(_EPS)
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
    return where(is_zero | (sum_l2 <= zero), zero, sum_lx / sum_l2)


@inlined
def _quantize_by_maximum(values: Any, levels: Any, n: int, highest: int) -> Any:
    """The factor of n values >= 0 such that the largest gets the highest level; their levels [n] as i32."""
    zero = floats(0.0)
    high = zero
    for i in range(n):
        v = load(values, i)
        high = where(v > high, v, high)
    inverse = where(high > zero, floats(highest) / high, zero)
    for i in range(n):
        level = nearest_int(inverse * load(values, i)) & ints(0xFF)
        store(levels, i, where(level > ints(highest), ints(highest), level))
    return high / floats(highest)


@inlined
def _requantize(x: Any, levels: Any, first: int, n: int, d: Any, minimum: Any, highest: int) -> None:
    """Levels for the scale and minimum as they are stored; where the scale became 0 they stay the search's."""
    is_zero = d == floats(0.0)
    for i in range(first, first + n):
        level = clamp(nearest_int((load(x, i) + minimum) / d), ints(0), ints(highest))
        store_bytes(levels, i, where(is_zero, load_bytes(levels, i), level))


@inlined
def _weights(x: Any, importance: Any, w: Any, first: int, n: int, sigma2: Any) -> Any:
    """w [n] = importance * sqrt(sigma2 + x^2); returns their sum."""
    total = floats(0.0)
    for i in range(n):
        v = load(x, first + i)
        weight = floats(importance[first + i]) * sqrt(sigma2 + v * v)
        store(w, i, weight)
        total = total + weight
    return total


@inlined
def _sum_of_squares(x: Any, first: int, n: int) -> Any:
    total = floats(0.0)
    for i in range(first, first + n):
        v = load(x, i)
        total = total + v * v
    return total


@inlined
def _store_half(y: Any, i: int, half: Any) -> None:
    store_bytes(y, i, half)
    store_bytes(y, i + 1, half >> ints(8))


# Q4_K and Q5_K --------------------------------------------------------------------------------------------------
#
#   d f16 | dmin f16 | scales 12: 6 bits each for 8 scales and 8 minimums | Q5_K: qh 32 | qs 128


@inlined
def _encode_6bit_scales(x: Any, importance: Any, y: Any, levels: Any, highest: int, with_grid: Any, grid: Any) -> None:
    """Everything but the levels' packing. with_grid, grid: the searches' with and without importance."""
    w, aux = np.empty(32 * LANES, np.float32), np.empty(32 * LANES, np.float32)
    scales, minimums = np.empty(8 * LANES, np.float32), np.empty(8 * LANES, np.float32)
    sums = np.empty(8 * LANES, np.float32)
    scale_levels, minimum_levels = np.empty(8 * LANES, np.int32), np.empty(8 * LANES, np.int32)
    if importance is not None:
        sigma2 = floats(2.0) * _sum_of_squares(x, 0, 256) / floats(256.0)
    for j in range(8):
        if importance is None:
            average = sqrt(_sum_of_squares(x, 32 * j, 32) / floats(32.0))
            for i in range(32):
                store(w, i, average + absolute(load(x, 32 * j + i)))
            scale, minimum = _search(x, w, levels, aux, 32 * j, 32, highest, grid, False)
        else:
            store(sums, j, _weights(x, importance, w, 32 * j, 32, sigma2))
            scale, minimum = _search(x, w, levels, aux, 32 * j, 32, highest, with_grid, False)
        store(scales, j, scale)
        store(minimums, j, minimum)
    if importance is None:
        d = to_half(_quantize_by_maximum(scales, scale_levels, 8, 63))
        dmin = to_half(_quantize_by_maximum(minimums, minimum_levels, 8, 63))
    else:
        d = to_half(_quantize_positive(scales, sums, scale_levels, 8, 63))
        dmin = to_half(_quantize_positive(minimums, sums, minimum_levels, 8, 63))
    _store_half(y, 0, d)
    _store_half(y, 2, dmin)
    for j in range(4):
        low_scale, high_scale = load(scale_levels, j), load(scale_levels, j + 4)
        low_minimum, high_minimum = load(minimum_levels, j), load(minimum_levels, j + 4)
        store_bytes(y, 4 + j, low_scale | ((high_scale >> ints(4)) << ints(6)))
        store_bytes(y, 8 + j, low_minimum | ((high_minimum >> ints(4)) << ints(6)))
        store_bytes(y, 12 + j, (high_scale & ints(15)) | ((high_minimum & ints(15)) << ints(4)))
    for j in range(8):
        this_d = from_half(d) * to_float(load(scale_levels, j))
        this_minimum = from_half(dmin) * to_float(load(minimum_levels, j))
        _requantize(x, levels, 32 * j, 32, this_d, this_minimum, highest)


_Q4_K_WITH = _grid(-0.9, 0.05, 37, 15)
_Q4_K = _grid(-1.0, 0.1, 21, 15)


@inlined
def _encode_q4_k(x: Any, importance: Any, y: Any) -> None:
    levels = np.empty(256 * LANES, np.uint8)
    _encode_6bit_scales(x, importance, y, levels, 15, _Q4_K_WITH, _Q4_K)
    for j in range(4):
        for i in range(32):
            low, high = load_bytes(levels, 64 * j + i), load_bytes(levels, 64 * j + 32 + i)
            store_bytes(y, 16 + 32 * j + i, low | (high << ints(4)))


_Q5_K_WITH = _grid(-0.9, 0.05, 37, 31)
_Q5_K = _grid(-0.5, 0.1, 16, 31)


@inlined
def _encode_q5_k(x: Any, importance: Any, y: Any) -> None:
    levels = np.empty(256 * LANES, np.uint8)
    _encode_6bit_scales(x, importance, y, levels, 31, _Q5_K_WITH, _Q5_K)
    for i in range(32):
        upper = ints(0)
        for j in range(4):
            low, high = load_bytes(levels, 64 * j + i), load_bytes(levels, 64 * j + 32 + i)
            store_bytes(y, 48 + 32 * j + i, (low & ints(15)) | ((high & ints(15)) << ints(4)))
            upper = upper | ((low >> ints(4)) << ints(2 * j)) | ((high >> ints(4)) << ints(2 * j + 1))
        store_bytes(y, 16 + i, upper)


# Q2_K -----------------------------------------------------------------------------------------------------------
#
#   scales 16: 4 bits scale, 4 bits minimum | qs 64 | d f16 | dmin f16

_Q2_K_WITH = _grid(-0.9, 0.05, 37, 3)
_Q2_K = _grid(-0.5, 0.1, 16, 3)


@inlined
def _encode_q2_k(x: Any, importance: Any, y: Any) -> None:
    levels = np.empty(256 * LANES, np.uint8)
    w, aux = np.empty(16 * LANES, np.float32), np.empty(16 * LANES, np.float32)
    scales, minimums = np.empty(16 * LANES, np.float32), np.empty(16 * LANES, np.float32)
    sums = np.empty(16 * LANES, np.float32)
    scale_levels, minimum_levels = np.empty(16 * LANES, np.int32), np.empty(16 * LANES, np.int32)
    if importance is not None:
        sigma2 = _sum_of_squares(x, 0, 256) / floats(256.0)
    for j in range(16):
        if importance is None:
            for i in range(16):
                store(w, i, absolute(load(x, 16 * j + i)))
            scale, minimum = _search(x, w, levels, aux, 16 * j, 16, 3, _Q2_K, True)
        else:
            store(sums, j, _weights(x, importance, w, 16 * j, 16, sigma2))
            scale, minimum = _search(x, w, levels, aux, 16 * j, 16, 3, _Q2_K_WITH, False)
        store(scales, j, scale)
        store(minimums, j, minimum)
    if importance is None:
        d = to_half(_quantize_by_maximum(scales, scale_levels, 16, 15))
        dmin = to_half(_quantize_by_maximum(minimums, minimum_levels, 16, 15))
    else:
        d = to_half(_quantize_positive(scales, sums, scale_levels, 16, 15))
        dmin = to_half(_quantize_positive(minimums, sums, minimum_levels, 16, 15))
    _store_half(y, 80, d)
    _store_half(y, 82, dmin)
    for j in range(16):
        scale_level, minimum_level = load(scale_levels, j), load(minimum_levels, j)
        store_bytes(y, j, scale_level | (minimum_level << ints(4)))
        this_d, this_minimum = from_half(d) * to_float(scale_level), from_half(dmin) * to_float(minimum_level)
        _requantize(x, levels, 16 * j, 16, this_d, this_minimum, 3)
    for j in range(2):
        for i in range(32):
            packed = ints(0)
            for k in range(4):
                packed = packed | (load_bytes(levels, 128 * j + 32 * k + i) << ints(2 * k))
            store_bytes(y, 16 + 32 * j + i, packed)


ENCODERS = {
    "Q2_K": encoder("Q2_K", 256, 84, _encode_q2_k),
    "Q4_K": encoder("Q4_K", 256, 144, _encode_q4_k),
    "Q5_K": encoder("Q5_K", 256, 176, _encode_q5_k),
}
