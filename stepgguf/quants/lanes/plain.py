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

import numpy as np

from stepgguf.quants.lanes.blocks import (
    bit_field,
    inverse_or_zero,
    load_half,
    lowest_and_highest,
    nibbles,
    signed_extreme,
    store_half,
    store_weights,
)
from stepgguf.quants.lanes.compile import inlined
from stepgguf.quants.lanes.lane_kernels import define_type, define_type_of_row
from stepgguf.quants.lanes.operands import ByteTile, F32Lanes, F32Tile, I32Lanes, Importance
from stepgguf.quants.lanes.search import MinimumSearch, ScaleSearch, make_minimum_search, make_scale_search
from stepgguf.quants.lanes.vector import (
    absolute,
    bits_of,
    byte_tile,
    f32_tile,
    float_of_bits,
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
def _store_levels(levels: ByteTile, y: ByteTile, place: int) -> None:
    """Pack the lower 4 bits of 32 levels into 16 bytes from y[place] on."""
    for i in range(16):
        store_bytes(y, place + i, nibbles(load_bytes(levels, i), load_bytes(levels, 16 + i)))


@inlined
def _store_upper_bits(levels: ByteTile, y: ByteTile, place: int) -> None:
    """Pack bit 4 of 32 levels into 4 bytes from y[place] on: ggml's uint32_t qh, little-endian."""
    for j in range(4):
        upper = ints(0)
        for i in range(8):
            upper = upper | (bit_field(load_bytes(levels, 8 * j + i), 4, 1) << ints(i))
        store_bytes(y, place + j, upper)


@inlined
def _load_level(y: ByteTile, place: int, i: int) -> I32Lanes:
    """The lower 4 bits of level i, of those in 16 bytes from y[place] on."""
    return bit_field(load_bytes(y, place + i % 16), 4 * (i // 16), 4)


@inlined
def _load_upper_bit(y: ByteTile, place: int, i: int) -> I32Lanes:
    """The upper bit of level i, where it counts 16."""
    return bit_field(load_bytes(y, place + i // 8), i % 8, 1) << ints(4)


@inlined
def _store_truncated(v: F32Lanes, highest: int, levels: ByteTile, i: int) -> None:
    """Put level i as MIN(highest, (uint8_t) v) gives it: C truncates."""
    level = to_int(v) & ints(0xFF)
    store_bytes(levels, i, where(level > ints(highest), ints(highest), level))


# Q4_0 and Q5_0 --------------------------------------------------------------------------------------------------


@inlined
def _quantize_around_zero(
    x: F32Tile, importance: Importance, levels: ByteTile, mean_square: F32Lanes, half: int, search: ScaleSearch
) -> F32Lanes:
    """The scale d of 32 values; their levels, from 0 to 2 * half - 1, go to `levels`."""
    if importance is not None:
        w = f32_tile(32)
        store_weights(x, importance, w, 0, 32, mean_square)
        return search(x, w, levels, 0, 32)
    # The extreme value gets level 0, which is the furthest from `half`: d has the other sign.
    d = signed_extreme(x, 0, 32) / floats(-half)
    inverse = inverse_or_zero(d)
    for i in range(32):
        _store_truncated(load(x, i) * inverse + floats(half + 0.5), 2 * half - 1, levels, i)
    return d


_search_8, _search_16 = make_scale_search(8), make_scale_search(16)


@inlined
def _encode_q4_0(x: F32Tile, importance: Importance, y: ByteTile, mean_square: F32Lanes) -> None:
    levels = byte_tile(32)
    store_half(y, 0, _quantize_around_zero(x, importance, levels, mean_square, 8, _search_8))
    _store_levels(levels, y, 2)


@inlined
def _decode_q4_0(y: ByteTile, z: F32Tile) -> None:
    d = load_half(y, 0)
    for i in range(32):
        store(z, i, to_float(_load_level(y, 2, i) - ints(8)) * d)


@inlined
def _encode_q5_0(x: F32Tile, importance: Importance, y: ByteTile, mean_square: F32Lanes) -> None:
    levels = byte_tile(32)
    store_half(y, 0, _quantize_around_zero(x, importance, levels, mean_square, 16, _search_16))
    _store_upper_bits(levels, y, 2)
    _store_levels(levels, y, 6)


@inlined
def _decode_q5_0(y: ByteTile, z: F32Tile) -> None:
    d = load_half(y, 0)
    for i in range(32):
        store(z, i, to_float((_load_level(y, 6, i) | _load_upper_bit(y, 2, i)) - ints(16)) * d)


# Q4_1 and Q5_1 --------------------------------------------------------------------------------------------------


@inlined
def _quantize_from_lowest(
    x: F32Tile, importance: Importance, levels: ByteTile, mean_square: F32Lanes, highest: int, search: MinimumSearch
) -> tuple[F32Lanes, F32Lanes]:
    """The scale and the minimum (d, m) of 32 values; their levels, from 0 to `highest`, go to `levels`."""
    if importance is not None:
        w, tried = f32_tile(32), f32_tile(32)
        store_weights(x, importance, w, 0, 32, mean_square)
        return search(x, w, levels, tried, 0, 32)
    low, high = lowest_and_highest(x, 0, 32)
    d = (high - low) / floats(highest)
    inverse = inverse_or_zero(d)
    for i in range(32):
        _store_truncated((load(x, i) - low) * inverse + floats(0.5), highest, levels, i)
    return d, low


_search_15, _search_31 = make_minimum_search(15, -0.9, 0.05, 37), make_minimum_search(31, -0.9, 0.05, 37)


@inlined
def _encode_q4_1(x: F32Tile, importance: Importance, y: ByteTile, mean_square: F32Lanes) -> None:
    levels = byte_tile(32)
    d, low = _quantize_from_lowest(x, importance, levels, mean_square, 15, _search_15)
    store_half(y, 0, d)
    store_half(y, 2, low)
    _store_levels(levels, y, 4)


@inlined
def _decode_q4_1(y: ByteTile, z: F32Tile) -> None:
    d, low = load_half(y, 0), load_half(y, 2)
    for i in range(32):
        store(z, i, to_float(_load_level(y, 4, i)) * d + low)


@inlined
def _encode_q5_1(x: F32Tile, importance: Importance, y: ByteTile, mean_square: F32Lanes) -> None:
    levels = byte_tile(32)
    d, low = _quantize_from_lowest(x, importance, levels, mean_square, 31, _search_31)
    store_half(y, 0, d)
    store_half(y, 2, low)
    _store_upper_bits(levels, y, 4)
    _store_levels(levels, y, 8)


@inlined
def _decode_q5_1(y: ByteTile, z: F32Tile) -> None:
    d, low = load_half(y, 0), load_half(y, 2)
    for i in range(32):
        store(z, i, to_float(_load_level(y, 8, i) | _load_upper_bit(y, 4, i)) * d + low)


# Q8_0 -----------------------------------------------------------------------------------------------------------

_BELOW_HALF = np.nextafter(np.float32(0.5), np.float32(0))  # so that what is just below a half does not round up
_SIGN_BIT = -(2**31)


@inlined
def _encode_q8_0(x: F32Tile, importance: Importance, y: ByteTile) -> None:
    d = absolute(signed_extreme(x, 0, 32)) / floats(127.0)
    inverse = inverse_or_zero(d)
    store_half(y, 0, d)
    for i in range(32):
        v = load(x, i) * inverse
        # roundf: halves away from zero. Half of v's sign is added and to_int cuts off what is behind the point.
        half = float_of_bits((bits_of(v) & ints(_SIGN_BIT)) | bits_of(floats(_BELOW_HALF)))
        store_bytes(y, 2 + i, to_int(v + half))


@inlined
def _decode_q8_0(y: ByteTile, z: F32Tile) -> None:
    d = load_half(y, 0)
    for i in range(32):
        level = (load_bytes(y, 2 + i) ^ ints(0x80)) - ints(0x80)  # int8: its sign bit counts -128
        store(z, i, to_float(level) * d)


# MXFP4 ----------------------------------------------------------------------------------------------------------
#
# Levels are FP4 E2M1 codes and e is a power of two (E8M0). ggml's kvalues_mxfp4 are doubled, hence the 128 of e - 128.

_VALUES = np.array([0, 1, 2, 3, 4, 6, 8, 12], np.float32)  # of levels 0-7; 8-15 are their negatives
_MIDDLES = (_VALUES[:-1] + _VALUES[1:]) / np.float32(2)
_LOG2_E = 1.442695


@inlined
def _exponent(size: F32Lanes) -> I32Lanes:
    """ggml's e: floor(log2f(size)) + 125, of which a byte stays; 0 for 0.

    log2f rounds to a float: for a size just below 2^k it is k itself where |k| is large.
    """
    zero = floats(0.0)
    is_denormal = size < floats(2.0**-126)  # its exponent's bits say nothing before it is scaled up
    word = bits_of(where(is_denormal, size * floats(2.0**24), size))
    k = (word >> ints(23)) - where(is_denormal, ints(126 + 24), ints(126))  # the least with size < 2^k
    missing = to_float(ints(0x00800000) - (word & ints(0x007FFFFF))) * floats(2.0**-24)  # size = 2^k (1 - missing)
    log = to_float(k) - missing * floats(_LOG2_E)  # right near k, where missing is small
    floor = where(log == to_float(k), k, k - ints(1))
    return where(size > zero, (floor + ints(125)) & ints(0xFF), ints(0))


@inlined
def _power_of(e: I32Lanes) -> F32Lanes:
    """2^(e - 128), as ggml_e8m0_to_fp32_half: the two smallest are denormal and have no exponent's bits."""
    return float_of_bits(where(e < ints(2), ints(0x00200000) << e, (e - ints(1)) << ints(23)))


@inlined
def _encode_mxfp4(x: F32Tile, importance: Importance, y: ByteTile) -> None:
    e = _exponent(absolute(signed_extreme(x, 0, 32)))
    d = _power_of(e)
    store_bytes(y, 0, e)
    for i in range(16):
        store_bytes(y, 1 + i, nibbles(_nearest_level(load(x, i), d), _nearest_level(load(x, 16 + i), d)))


@inlined
def _nearest_level(v: F32Lanes, d: F32Lanes) -> I32Lanes:
    """The level whose value times d is nearest to v; of two as near, the smaller, and 0 rather than minus 0."""
    size, level = absolute(v), ints(0)
    for i in range(7):
        level = where(size > d * floats(_MIDDLES[i]), ints(i + 1), level)
    is_negative = (v < floats(0.0)) & (level > ints(0))
    return where(is_negative, level | ints(8), level)


@inlined
def _decode_mxfp4(y: ByteTile, z: F32Tile) -> None:
    d = _power_of(load_bytes(y, 0))
    for i in range(32):
        level = _load_level(y, 1, i)
        size = level & ints(7)
        # 0, 1, 2, 3, 4, 6, 8, 12: computed, as a gather takes longer than three selections
        value = where(size < ints(5), size, where(size < ints(7), size + size - ints(4), ints(12)))
        value = where(level > ints(7), ints(0) - value, value)
        store(z, i, to_float(value) * d)


TYPES = {
    "Q4_0": define_type_of_row("Q4_0", _encode_q4_0, _decode_q4_0),
    "Q4_1": define_type_of_row("Q4_1", _encode_q4_1, _decode_q4_1),
    "Q5_0": define_type_of_row("Q5_0", _encode_q5_0, _decode_q5_0),
    "Q5_1": define_type_of_row("Q5_1", _encode_q5_1, _decode_q5_1),
    "Q8_0": define_type("Q8_0", _encode_q8_0, _decode_q8_0),
    "MXFP4": define_type("MXFP4", _encode_mxfp4, _decode_mxfp4),
}
