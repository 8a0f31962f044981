"""Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, MXFP4: blocks of 32 that stand alone, with a scale and maybe a minimum.

    x[i] ~ d * (level[i] - half)    Q4_0: d f16 | qs 16          Q5_0: d f16 | qh 4 | qs 16
    x[i] ~ d * level[i] + m         Q4_1: d f16 | m f16 | qs 16  Q5_1: d f16 | m f16 | qh 4 | qs 16
    x[i] ~ d * level[i]             Q8_0: d f16 | qs 32 int8
    x[i] ~ 2^(e - 128) * VALUES[level[i]]                        MXFP4: e | qs 16

qs[i]: the lower 4 bits of level i, then those of level i + 16. Bit i of qh: the upper bit of level i.

Without importance ggml puts the extreme values on the outermost levels; with it, it searches (search.py). Q8_0 and
MXFP4 never look at importance.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from stepgguf.quants.lanes.blocks import extreme, inverse_or_zero, load_half, store_half, weigh
from stepgguf.quants.lanes.compile import inlined
from stepgguf.quants.lanes.lanetype import lane_type
from stepgguf.quants.lanes.rounding import to_half
from stepgguf.quants.lanes.search import around_zero, from_lowest, search_scale, search_scale_and_minimum
from stepgguf.quants.lanes.vector import (
    LANES,
    absolute,
    bits,
    floats,
    ints,
    load,
    load_bytes,
    store,
    store_bytes,
    to_float,
    to_int,
    where,
)


@inlined
def _store_levels(levels: Any, y: Any, place: int) -> None:
    """The lower 4 bits of 32 levels, in 16 bytes from y[place] on."""
    for i in range(16):
        low, high = load_bytes(levels, i), load_bytes(levels, 16 + i)
        store_bytes(y, place + i, (low & ints(15)) | ((high & ints(15)) << ints(4)))


@inlined
def _store_upper_bits(levels: Any, y: Any, place: int) -> None:
    """Bit 4 of 32 levels, in 4 bytes from y[place] on."""
    for j in range(4):
        upper = ints(0)
        for i in range(8):
            upper = upper | (((load_bytes(levels, 8 * j + i) >> ints(4)) & ints(1)) << ints(i))
        store_bytes(y, place + j, upper)


@inlined
def _level(y: Any, place: int, i: int) -> Any:
    """The lower 4 bits of level i, of those in 16 bytes from y[place] on."""
    return (load_bytes(y, place + i % 16) >> ints(4 * (i // 16))) & ints(15)


@inlined
def _upper_bit(y: Any, place: int, i: int) -> Any:
    """The upper bit of level i, where it counts 16."""
    return ((load_bytes(y, place + i // 8) >> ints(i % 8)) & ints(1)) << ints(4)


# Q4_0 and Q5_0 --------------------------------------------------------------------------------------------------


@inlined
def _scale(x: Any, importance: Any, levels: Any, mean_square: Any, grid: Any, half: int) -> Any:
    """d as FP16, and the levels."""
    if importance is not None:
        w = np.empty(32 * LANES, np.float32)
        weigh(x, importance, w, 0, 32, mean_square)
        return to_half(search_scale(x, w, levels, 0, 32, half, grid))
    d = extreme(x, 0, 32) / floats(-half)
    inverse = inverse_or_zero(d)
    top = ints(2 * half - 1)
    for i in range(32):
        level = to_int(load(x, i) * inverse + floats(half + 0.5)) & ints(0xFF)
        store_bytes(levels, i, where(level > top, top, level))
    return to_half(d)


_GRID_8, _GRID_16 = around_zero(8), around_zero(16)


@inlined
def _encode_q4_0(x: Any, importance: Any, y: Any, mean_square: Any) -> None:
    levels = np.empty(32 * LANES, np.uint8)
    store_half(y, 0, _scale(x, importance, levels, mean_square, _GRID_8, 8))
    _store_levels(levels, y, 2)


@inlined
def _decode_q4_0(y: Any, z: Any) -> None:
    d = load_half(y, 0)
    for i in range(32):
        store(z, i, to_float(_level(y, 2, i) - ints(8)) * d)


@inlined
def _encode_q5_0(x: Any, importance: Any, y: Any, mean_square: Any) -> None:
    levels = np.empty(32 * LANES, np.uint8)
    store_half(y, 0, _scale(x, importance, levels, mean_square, _GRID_16, 16))
    _store_upper_bits(levels, y, 2)
    _store_levels(levels, y, 6)


@inlined
def _decode_q5_0(y: Any, z: Any) -> None:
    d = load_half(y, 0)
    for i in range(32):
        store(z, i, to_float((_level(y, 6, i) | _upper_bit(y, 2, i)) - ints(16)) * d)


# Q4_1 and Q5_1 --------------------------------------------------------------------------------------------------


@inlined
def _scale_and_minimum(x: Any, importance: Any, levels: Any, mean_square: Any, grid: Any, highest: int) -> Any:
    """d and m as FP16, and the levels."""
    if importance is not None:
        w, aux = np.empty(32 * LANES, np.float32), np.empty(32 * LANES, np.float32)
        weigh(x, importance, w, 0, 32, mean_square)
        d, low = search_scale_and_minimum(x, w, levels, aux, 0, 32, highest, grid, False)
        return to_half(d), to_half(low)
    low, high = load(x, 0), load(x, 0)
    for i in range(1, 32):
        v = load(x, i)
        low = where(v < low, v, low)
        high = where(v > high, v, high)
    d = (high - low) / floats(highest)
    inverse = inverse_or_zero(d)
    top = ints(highest)
    for i in range(32):
        level = to_int((load(x, i) - low) * inverse + floats(0.5)) & ints(0xFF)
        store_bytes(levels, i, where(level > top, top, level))
    return to_half(d), to_half(low)


_GRID_15, _GRID_31 = from_lowest(-0.9, 0.05, 37, 15), from_lowest(-0.9, 0.05, 37, 31)


@inlined
def _encode_q4_1(x: Any, importance: Any, y: Any, mean_square: Any) -> None:
    levels = np.empty(32 * LANES, np.uint8)
    d, low = _scale_and_minimum(x, importance, levels, mean_square, _GRID_15, 15)
    store_half(y, 0, d)
    store_half(y, 2, low)
    _store_levels(levels, y, 4)


@inlined
def _decode_q4_1(y: Any, z: Any) -> None:
    d, low = load_half(y, 0), load_half(y, 2)
    for i in range(32):
        store(z, i, to_float(_level(y, 4, i)) * d + low)


@inlined
def _encode_q5_1(x: Any, importance: Any, y: Any, mean_square: Any) -> None:
    levels = np.empty(32 * LANES, np.uint8)
    d, low = _scale_and_minimum(x, importance, levels, mean_square, _GRID_31, 31)
    store_half(y, 0, d)
    store_half(y, 2, low)
    _store_upper_bits(levels, y, 4)
    _store_levels(levels, y, 8)


@inlined
def _decode_q5_1(y: Any, z: Any) -> None:
    d, low = load_half(y, 0), load_half(y, 2)
    for i in range(32):
        store(z, i, to_float(_level(y, 8, i) | _upper_bit(y, 4, i)) * d + low)


# Q8_0 -----------------------------------------------------------------------------------------------------------

_BELOW_HALF = np.nextafter(np.float32(0.5), np.float32(0))  # so that what is just below a half does not round up


@inlined
def _largest(x: Any) -> Any:
    """The largest |value| of 32."""
    size = floats(0.0)
    for i in range(32):
        v = absolute(load(x, i))
        size = where(v > size, v, size)
    return size


@inlined
def _encode_q8_0(x: Any, importance: Any, y: Any) -> None:
    d = _largest(x) / floats(127.0)
    inverse = inverse_or_zero(d)
    store_half(y, 0, to_half(d))
    for i in range(32):
        v = load(x, i) * inverse
        # roundf: halves away from zero
        half = bits((bits(v) & ints(-(2**31))) | bits(floats(_BELOW_HALF)))
        store_bytes(y, 2 + i, to_int(v + half))


@inlined
def _decode_q8_0(y: Any, z: Any) -> None:
    d = load_half(y, 0)
    for i in range(32):
        store(z, i, to_float((load_bytes(y, 2 + i) ^ ints(0x80)) - ints(0x80)) * d)


# MXFP4 ----------------------------------------------------------------------------------------------------------

_VALUES = np.array([0, 1, 2, 3, 4, 6, 8, 12], np.float32)  # of levels 0-7; 8-15 are their negatives
_MIDDLES = (_VALUES[:-1] + _VALUES[1:]) / np.float32(2)
_LOG2_E = 1.442695


@inlined
def _exponent(size: Any) -> Any:
    """ggml's e: floor(log2f(size)) + 125, of which a byte stays; 0 for 0.

    log2f rounds to a float: for a size just below 2^k it is k itself where |k| is large.
    """
    zero = floats(0.0)
    is_denormal = size < floats(2.0**-126)
    word = bits(where(is_denormal, size * floats(2.0**24), size))
    k = (word >> ints(23)) - where(is_denormal, ints(126 + 24), ints(126))  # the least with size < 2^k
    missing = to_float(ints(0x00800000) - (word & ints(0x007FFFFF))) * floats(2.0**-24)  # size = 2^k (1 - missing)
    log = to_float(k) - missing * floats(_LOG2_E)  # right near k, where missing is small
    floor = where(log == to_float(k), k, k - ints(1))
    return where(size > zero, (floor + ints(125)) & ints(0xFF), ints(0))


@inlined
def _power(e: Any) -> Any:
    """2^(e - 128)."""
    return bits(where(e < ints(2), ints(0x00200000) << e, (e - ints(1)) << ints(23)))


@inlined
def _encode_mxfp4(x: Any, importance: Any, y: Any) -> None:
    e = _exponent(_largest(x))
    d = _power(e)
    store_bytes(y, 0, e)
    for i in range(16):
        store_bytes(y, 1 + i, _nearest_value(load(x, i), d) | (_nearest_value(load(x, 16 + i), d) << ints(4)))


@inlined
def _nearest_value(v: Any, d: Any) -> Any:
    """The level whose value times d is nearest to v; of two as near, the smaller, and 0 rather than minus 0."""
    size, level = absolute(v), ints(0)
    for i in range(7):
        level = where(size > d * floats(_MIDDLES[i]), ints(i + 1), level)
    is_negative = (v < floats(0.0)) & (level > ints(0))
    return where(is_negative, level | ints(8), level)


@inlined
def _decode_mxfp4(y: Any, z: Any) -> None:
    d = _power(load_bytes(y, 0))
    for i in range(32):
        level = _level(y, 1, i)
        size = level & ints(7)
        # 0, 1, 2, 3, 4, 6, 8, 12
        value = where(size < ints(5), size, where(size < ints(7), size + size - ints(4), ints(12)))
        value = where(level > ints(7), ints(0) - value, value)
        store(z, i, to_float(value) * d)


TYPES = {
    "Q4_0": lane_type("Q4_0", 32, 18, _encode_q4_0, _decode_q4_0, of_row=True),
    "Q4_1": lane_type("Q4_1", 32, 20, _encode_q4_1, _decode_q4_1, of_row=True),
    "Q5_0": lane_type("Q5_0", 32, 22, _encode_q5_0, _decode_q5_0, of_row=True),
    "Q5_1": lane_type("Q5_1", 32, 24, _encode_q5_1, _decode_q5_1, of_row=True),
    "Q8_0": lane_type("Q8_0", 32, 34, _encode_q8_0, _decode_q8_0),
    "MXFP4": lane_type("MXFP4", 32, 17, _encode_mxfp4, _decode_mxfp4),
}
