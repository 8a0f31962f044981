"""Q3_K, Q6_K: blocks of 256 whose sub-blocks of 16 have a scale, quantized itself, and levels around zero.

    x[i] ~ d * scale[j] * (level[i] - half)        j: sub-block of i; half: 4 for Q3_K, 32 for Q6_K

ggml searches each sub-block's scale (search.py), rounds the scales to steps of d, and then the values to the scales as
they are stored.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from stepgguf.quants.lanes.blocks import extreme, load_half, store_half, sum_of_squares, weigh
from stepgguf.quants.lanes.compile import inlined
from stepgguf.quants.lanes.lanetype import lane_type
from stepgguf.quants.lanes.rounding import clamp, from_half, nearest_int, to_half
from stepgguf.quants.lanes.search import EPS, around_zero, search_scale
from stepgguf.quants.lanes.vector import (
    LANES,
    absolute,
    any_lane,
    floats,
    ints,
    load,
    load_bytes,
    store,
    store_bytes,
    to_float,
    where,
)

_GRID_4, _GRID_32 = around_zero(4), around_zero(32)


@inlined
def _requantize(x: Any, levels: Any, first: int, scale: Any, half: int) -> None:
    """Levels of 16 values for the scale as it is stored; where that is 0 they stay the search's."""
    is_zero = scale == floats(0.0)
    for i in range(first, first + 16):
        level = clamp(nearest_int(load(x, i) / scale), ints(-half), ints(half - 1)) + ints(half)
        store_bytes(levels, i, where(is_zero, load_bytes(levels, i), level))


# Q3_K -----------------------------------------------------------------------------------------------------------
#
#   upper bit of the levels 32 | lower 2 bits 64 | scales 12: lower 4 bits of 16 in 8, upper 2 bits in 4 | d f16


@inlined
def _refine(x: Any, levels: Any, aux: Any, first: int) -> Any:
    """make_q3_quants: the scale of 16 values, each weighing its square; a level moves if that alone helps.

    aux [16]: scratch.
    """
    zero = floats(0.0)
    top = extreme(x, first, 16)
    is_zero = absolute(top) < floats(EPS)
    inverse = floats(-4.0) / top
    sum_xl, sum_l2 = zero, zero
    for i in range(16):
        v = load(x, first + i)
        level = to_float(clamp(nearest_int(inverse * v), ints(-4), ints(3)))
        store(aux, i, level)
        sum_xl = sum_xl + v * v * v * level
        sum_l2 = sum_l2 + v * v * level * level
    for _ in range(5):
        has_changed = zero < zero
        for i in range(16):
            v, old = load(x, first + i), load(aux, i)
            xl = sum_xl - v * v * v * old
            l2 = sum_l2 - v * v * old * old
            level = to_float(clamp(nearest_int(v * l2 / xl), ints(-4), ints(3)))
            may = (xl > zero) & (level != old)
            xl = xl + v * v * v * level
            l2 = l2 + v * v * level * level
            is_better = may & (l2 > zero) & (xl * xl * sum_l2 > sum_xl * sum_xl * l2)
            store(aux, i, where(is_better, level, old))
            sum_xl = where(is_better, xl, sum_xl)
            sum_l2 = where(is_better, l2, sum_l2)
            has_changed = has_changed | is_better
        if not any_lane(has_changed):
            break
    for i in range(16):
        store_bytes(levels, first + i, where(is_zero, ints(0), nearest_int(load(aux, i)) + ints(4)))
    return where(is_zero, zero, where(sum_l2 > zero, sum_xl / sum_l2, zero))


@inlined
def _encode_q3_k(x: Any, importance: Any, y: Any) -> None:
    levels, scale_levels = np.empty(256 * LANES, np.uint8), np.empty(16 * LANES, np.uint8)
    aux, scales = np.empty(16 * LANES, np.float32), np.empty(16 * LANES, np.float32)
    sums = np.empty(16 * LANES, np.float32)
    if importance is None:
        for j in range(16):
            store(scales, j, _refine(x, levels, aux, 16 * j))
        largest = extreme(scales, 0, 16)
        is_zero = largest == floats(0.0)
        inverse = floats(-32.0) / largest
        for j in range(16):
            level = clamp(nearest_int(inverse * load(scales, j)), ints(-32), ints(31)) + ints(32)
            store_bytes(scale_levels, j, where(is_zero, ints(0), level))
        d = to_half(where(is_zero, floats(0.0), floats(1.0) / inverse))
    else:
        sigma2 = floats(2.0) * sum_of_squares(x, 0, 256) / floats(256.0)
        for j in range(16):
            store(sums, j, weigh(x, importance, aux, 16 * j, 16, sigma2))
            store(scales, j, search_scale(x, aux, levels, 16 * j, 16, 4, _GRID_4))
        d = to_half(search_scale(scales, sums, scale_levels, 0, 16, 32, _GRID_32))
    store_half(y, 108, d)
    for j in range(16):
        level = load_bytes(scale_levels, j) - ints(32)
        _requantize(x, levels, 16 * j, from_half(d) * to_float(level), 4)
    for j in range(4):
        upper = ints(0)
        for k in range(4):
            upper = upper | ((load_bytes(scale_levels, 4 * k + j) >> ints(4)) << ints(2 * k))
        store_bytes(y, 104 + j, upper)
    for j in range(8):
        low, high = load_bytes(scale_levels, j) & ints(15), load_bytes(scale_levels, j + 8) & ints(15)
        store_bytes(y, 96 + j, low | (high << ints(4)))
    for i in range(32):
        upper = ints(0)
        for j in range(2):
            lower = ints(0)
            for k in range(4):
                level = load_bytes(levels, 128 * j + 32 * k + i)
                lower = lower | ((level & ints(3)) << ints(2 * k))
                upper = upper | ((level >> ints(2)) << ints(4 * j + k))
            store_bytes(y, 32 + 32 * j + i, lower)
        store_bytes(y, i, upper)


@inlined
def _decode_q3_k(y: Any, z: Any) -> None:
    d = load_half(y, 108)
    for j in range(16):
        low = (load_bytes(y, 96 + j % 8) >> ints(4 * (j // 8))) & ints(15)
        high = (load_bytes(y, 104 + j % 4) >> ints(2 * (j // 4))) & ints(3)
        scale = d * to_float((low | (high << ints(4))) - ints(32))
        for i in range(16):
            place = j % 2 * 16 + i
            lower = (load_bytes(y, 32 + j // 8 * 32 + place) >> ints(j % 8 // 2 * 2)) & ints(3)
            upper = (load_bytes(y, place) >> ints(j // 2)) & ints(1)
            store(z, 16 * j + i, scale * to_float((lower | (upper << ints(2))) - ints(4)))


# Q6_K -----------------------------------------------------------------------------------------------------------
#
#   lower 4 bits of the levels 128 | upper 2 bits 64 | scales 16 int8 | d f16


@inlined
def _encode_q6_k(x: Any, importance: Any, y: Any) -> None:
    levels = np.empty(256 * LANES, np.uint8)
    w, scales = np.empty(16 * LANES, np.float32), np.empty(16 * LANES, np.float32)
    for j in range(16):
        for i in range(16):
            v = load(x, 16 * j + i)
            store(w, i, v * v if importance is None else floats(importance[16 * j + i]))
        store(scales, j, search_scale(x, w, levels, 16 * j, 16, 32, _GRID_32))
    largest = extreme(scales, 0, 16)
    is_zero = absolute(largest) < floats(EPS)  # then every byte is
    inverse = floats(-128.0) / largest
    d = where(is_zero, ints(0), to_half(floats(1.0) / inverse))
    store_half(y, 208, d)
    for j in range(16):
        level = nearest_int(inverse * load(scales, j))
        level = where(is_zero, ints(0), where(level > ints(127), ints(127), level))
        store_bytes(y, 192 + j, level)
        _requantize(x, levels, 16 * j, from_half(d) * to_float(level), 32)
    for i in range(256):
        store_bytes(levels, i, where(is_zero, ints(0), load_bytes(levels, i)))
    for j in range(2):
        for i in range(32):
            upper = ints(0)
            for k in range(2):
                low, high = load_bytes(levels, 128 * j + 32 * k + i), load_bytes(levels, 128 * j + 32 * k + 64 + i)
                store_bytes(y, 64 * j + 32 * k + i, (low & ints(15)) | ((high & ints(15)) << ints(4)))
                upper = upper | ((low >> ints(4)) << ints(2 * k)) | ((high >> ints(4)) << ints(2 * k + 4))
            store_bytes(y, 128 + 32 * j + i, upper)


@inlined
def _decode_q6_k(y: Any, z: Any) -> None:
    d = load_half(y, 208)
    for j in range(16):
        scale_level = load_bytes(y, 192 + j)
        scale = d * to_float((scale_level ^ ints(0x80)) - ints(0x80))  # its sign bit counts -128
        for i in range(16):
            place = j % 4 * 16 + i  # of 64 bytes, each with a level of either half of 128
            lower = (load_bytes(y, j // 8 * 64 + place) >> ints(j % 8 // 4 * 4)) & ints(15)
            upper = (load_bytes(y, 128 + j // 8 * 32 + place % 32) >> ints(j % 8 // 2 * 2)) & ints(3)
            store(z, 16 * j + i, scale * to_float((lower | (upper << ints(4))) - ints(32)))


TYPES = {
    "Q3_K": lane_type("Q3_K", 256, 110, _encode_q3_k, _decode_q3_k),
    "Q6_K": lane_type("Q6_K", 256, 210, _encode_q6_k, _decode_q6_k),
}
