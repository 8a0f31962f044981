"""Q2_K, Q4_K, Q5_K: blocks of 256 whose sub-blocks have a scale and a minimum, both quantized themselves.

    x[i] ~ d * scale[j] * level[i] - dmin * min[j]        j: sub-block of i

ggml searches each sub-block's scale and minimum on a grid of scales, by least squares at each grid point, and then the
two super-block factors (search.py).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from stepgguf.quants.lanes.blocks import load_half, store_half, sum_of_squares, weigh
from stepgguf.quants.lanes.compile import inlined
from stepgguf.quants.lanes.lanetype import lane_type
from stepgguf.quants.lanes.rounding import clamp, from_half, nearest_int, to_half
from stepgguf.quants.lanes.search import from_lowest, quantize_positive, search_scale_and_minimum
from stepgguf.quants.lanes.vector import (
    LANES,
    absolute,
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
        sigma2 = floats(2.0) * sum_of_squares(x, 0, 256) / floats(256.0)
    for j in range(8):
        if importance is None:
            average = sqrt(sum_of_squares(x, 32 * j, 32) / floats(32.0))
            for i in range(32):
                store(w, i, average + absolute(load(x, 32 * j + i)))
            scale, minimum = search_scale_and_minimum(x, w, levels, aux, 32 * j, 32, highest, grid, False)
        else:
            store(sums, j, weigh(x, importance, w, 32 * j, 32, sigma2))
            scale, minimum = search_scale_and_minimum(x, w, levels, aux, 32 * j, 32, highest, with_grid, False)
        store(scales, j, scale)
        store(minimums, j, floats(0.0) - minimum)
    if importance is None:
        d = to_half(_quantize_by_maximum(scales, scale_levels, 8, 63))
        dmin = to_half(_quantize_by_maximum(minimums, minimum_levels, 8, 63))
    else:
        d = to_half(quantize_positive(scales, sums, scale_levels, 8, 63))
        dmin = to_half(quantize_positive(minimums, sums, minimum_levels, 8, 63))
    store_half(y, 0, d)
    store_half(y, 2, dmin)
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


_Q4_K_WITH = from_lowest(-0.9, 0.05, 37, 15)
_Q4_K = from_lowest(-1.0, 0.1, 21, 15)


@inlined
def _encode_q4_k(x: Any, importance: Any, y: Any) -> None:
    levels = np.empty(256 * LANES, np.uint8)
    _encode_6bit_scales(x, importance, y, levels, 15, _Q4_K_WITH, _Q4_K)
    for j in range(4):
        for i in range(32):
            low, high = load_bytes(levels, 64 * j + i), load_bytes(levels, 64 * j + 32 + i)
            store_bytes(y, 16 + 32 * j + i, low | (high << ints(4)))


@inlined
def _factors(y: Any, j: int) -> Any:
    """(d * scale, dmin * minimum) of sub-block j."""
    if j < 4:
        scale, minimum = load_bytes(y, 4 + j) & ints(63), load_bytes(y, 8 + j) & ints(63)
    else:
        low = load_bytes(y, 8 + j)
        scale = (low & ints(15)) | ((load_bytes(y, j) >> ints(6)) << ints(4))
        minimum = (low >> ints(4)) | ((load_bytes(y, 4 + j) >> ints(6)) << ints(4))
    return load_half(y, 0) * to_float(scale), load_half(y, 2) * to_float(minimum)


@inlined
def _decode_q4_k(y: Any, z: Any) -> None:
    for j in range(8):
        scale, minimum = _factors(y, j)
        for i in range(32):
            level = (load_bytes(y, 16 + j // 2 * 32 + i) >> ints(4 * (j % 2))) & ints(15)
            store(z, 32 * j + i, scale * to_float(level) - minimum)


_Q5_K_WITH = from_lowest(-0.9, 0.05, 37, 31)
_Q5_K = from_lowest(-0.5, 0.1, 16, 31)


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


@inlined
def _decode_q5_k(y: Any, z: Any) -> None:
    for j in range(8):
        scale, minimum = _factors(y, j)
        for i in range(32):
            level = (load_bytes(y, 48 + j // 2 * 32 + i) >> ints(4 * (j % 2))) & ints(15)
            upper = (load_bytes(y, 16 + i) >> ints(j)) & ints(1)
            store(z, 32 * j + i, scale * to_float(level | (upper << ints(4))) - minimum)


# Q2_K -----------------------------------------------------------------------------------------------------------
#
#   scales 16: 4 bits scale, 4 bits minimum | qs 64 | d f16 | dmin f16

_Q2_K_WITH = from_lowest(-0.9, 0.05, 37, 3)
_Q2_K = from_lowest(-0.5, 0.1, 16, 3)


@inlined
def _encode_q2_k(x: Any, importance: Any, y: Any) -> None:
    levels = np.empty(256 * LANES, np.uint8)
    w, aux = np.empty(16 * LANES, np.float32), np.empty(16 * LANES, np.float32)
    scales, minimums = np.empty(16 * LANES, np.float32), np.empty(16 * LANES, np.float32)
    sums = np.empty(16 * LANES, np.float32)
    scale_levels, minimum_levels = np.empty(16 * LANES, np.int32), np.empty(16 * LANES, np.int32)
    if importance is not None:
        sigma2 = sum_of_squares(x, 0, 256) / floats(256.0)
    for j in range(16):
        if importance is None:
            for i in range(16):
                store(w, i, absolute(load(x, 16 * j + i)))
            scale, minimum = search_scale_and_minimum(x, w, levels, aux, 16 * j, 16, 3, _Q2_K, True)
        else:
            store(sums, j, weigh(x, importance, w, 16 * j, 16, sigma2))
            scale, minimum = search_scale_and_minimum(x, w, levels, aux, 16 * j, 16, 3, _Q2_K_WITH, False)
        store(scales, j, scale)
        store(minimums, j, floats(0.0) - minimum)
    if importance is None:
        d = to_half(_quantize_by_maximum(scales, scale_levels, 16, 15))
        dmin = to_half(_quantize_by_maximum(minimums, minimum_levels, 16, 15))
    else:
        d = to_half(quantize_positive(scales, sums, scale_levels, 16, 15))
        dmin = to_half(quantize_positive(minimums, sums, minimum_levels, 16, 15))
    store_half(y, 80, d)
    store_half(y, 82, dmin)
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


@inlined
def _decode_q2_k(y: Any, z: Any) -> None:
    d, dmin = load_half(y, 80), load_half(y, 82)
    for j in range(16):
        packed = load_bytes(y, j)
        scale, minimum = d * to_float(packed & ints(15)), dmin * to_float(packed >> ints(4))
        for i in range(16):
            level = (load_bytes(y, 16 + j // 8 * 32 + j % 2 * 16 + i) >> ints(j % 8 // 2 * 2)) & ints(3)
            store(z, 16 * j + i, scale * to_float(level) - minimum)


TYPES = {
    "Q2_K": lane_type("Q2_K", 256, 84, _encode_q2_k, _decode_q2_k),
    "Q4_K": lane_type("Q4_K", 256, 144, _encode_q4_k, _decode_q4_k),
    "Q5_K": lane_type("Q5_K", 256, 176, _encode_q5_k, _decode_q5_k),
}
