"""IQ4_NL, IQ4_XS: 16 levels with uneven steps, one scale for 32 values.

    x[i] ~ d * VALUES[level[i]]                     IQ4_NL: d f16 | qs 16
    x[i] ~ d * (scale[j] - 32) * VALUES[level[i]]   IQ4_XS: d f16 | upper 2 bits of 8 scales 2 | lower 4 bits 4 | qs 128

ggml fits a scale by least squares for each of 16 guesses, all of which put the largest value near the lowest level, and
then rounds anew for the scale as chosen (quantize_row_iq4_nl_impl in ggml-quants.c).
"""

from __future__ import annotations

import numpy as np
from gguf.quants import IQ4_NL

from stepgguf.quants.lanes.blocks import (
    bit_field,
    inverse_or_zero,
    load_half,
    load_short,
    nibbles,
    signed_extreme,
    store_half,
    store_short,
    store_weights_or_squares,
    store_word,
    sum_of_squares,
)
from stepgguf.quants.lanes.compile import inlined
from stepgguf.quants.lanes.lane_kernels import define_type
from stepgguf.quants.lanes.operands import ByteTile, F32Lanes, F32Tile, I32Lanes, Importance
from stepgguf.quants.lanes.rounding import clamp, nearest_int
from stepgguf.quants.lanes.search import GROUP_MAX_EPS, improve_scale
from stepgguf.quants.lanes.vector import (
    absolute,
    f32_tile,
    floats,
    gather,
    ints,
    load,
    load_bytes,
    store,
    store_bytes,
    to_float,
    where,
)

_GUESSES = 7  # to each side: the largest value becomes level VALUES[0] +- this
VALUES = np.array(IQ4_NL.kvalues, np.float32)
# best_index_int8 compares the distances to both neighbours: exact differences there, so that is the middle.
_MIDDLES = (VALUES[:-1] + VALUES[1:]) / np.float32(2)


@inlined
def nearest_level(v: F32Lanes) -> I32Lanes:
    """The level whose value is nearest to v; of two as near, the higher. NaN gets the last."""
    level = ints(15)
    for i in range(14, -1, -1):
        level = where(v < floats(_MIDDLES[i]), ints(i), level)
    return level


@inlined
def _nearest_value(v: F32Lanes) -> F32Lanes:
    """The value of nearest_level(v)."""
    value = floats(VALUES[15])
    for i in range(14, -1, -1):
        value = where(v < floats(_MIDDLES[i]), floats(VALUES[i]), value)
    return value


@inlined
def _sum_products(x: F32Tile, w: F32Tile, first: int, inverse: F32Lanes) -> tuple[F32Lanes, F32Lanes]:
    """Sums of weight * value * x and weight * value^2 for the 32 values from vector `first` of x on."""
    sum_vx, sum_v2 = floats(0.0), floats(0.0)
    for i in range(32):
        v = load(x, first + i)
        value = _nearest_value(inverse * v)
        weighted = load(w, i) * value
        sum_vx = sum_vx + weighted * v
        sum_v2 = sum_v2 + weighted * value
    return sum_vx, sum_v2


@inlined
def _search_scale(x: F32Tile, w: F32Tile, first: int) -> F32Lanes:
    """The scale of the 32 values from vector `first` of x on. w [32]: weights."""
    zero = floats(0.0)
    extreme = signed_extreme(x, first, 32)
    # ggml's first guess is an inverse of a quotient, the others are quotients: they round differently.
    sum_vx, sum_v2 = _sum_products(x, w, first, floats(1.0) / (extreme / floats(-VALUES[0])))
    scale = where(sum_v2 > zero, sum_vx / sum_v2, zero)
    best = scale * sum_vx
    for guess in range(-_GUESSES, _GUESSES + 1):
        sum_vx, sum_v2 = _sum_products(x, w, first, floats(guess + VALUES[0]) / extreme)
        _, scale, best = improve_scale(sum_vx, sum_v2, scale, best)
    return where(absolute(extreme) < floats(GROUP_MAX_EPS), zero, scale)


@inlined
def _store_levels(x: F32Tile, y: ByteTile, first: int, place: int, inverse: F32Lanes) -> None:
    """Pack the levels of the 32 values from vector `first` of x on into 16 bytes: levels i and i + 16 share one."""
    for i in range(16):
        low, high = nearest_level(inverse * load(x, first + i)), nearest_level(inverse * load(x, first + 16 + i))
        store_bytes(y, place + i, nibbles(low, high))


@inlined
def _load_levels(y: ByteTile, place: int, scale: F32Lanes, z: F32Tile, first: int) -> None:
    """Decode the 32 levels in 16 bytes from y[place] on, times the scale, to z from vector `first` on."""
    for i in range(16):
        levels = load_bytes(y, place + i)
        store(z, first + i, scale * gather(VALUES, bit_field(levels, 0, 4)))
        store(z, first + 16 + i, scale * gather(VALUES, levels >> ints(4)))


# IQ4_NL ---------------------------------------------------------------------------------------------------------


@inlined
def _encode_iq4_nl(x: F32Tile, importance: Importance, y: ByteTile) -> None:
    w = f32_tile(32)
    sigma2 = sum_of_squares(x, 0, 32) * floats(2.0 / 32)
    store_weights_or_squares(x, importance, w, 0, 32, sigma2)
    scale = _search_scale(x, w, 0)
    store_half(y, 0, scale)
    _store_levels(x, y, 0, 2, inverse_or_zero(scale))


@inlined
def _decode_iq4_nl(y: ByteTile, z: F32Tile) -> None:
    _load_levels(y, 2, load_half(y, 0), z, 0)


# IQ4_XS ---------------------------------------------------------------------------------------------------------
#
# block_iq4_xs   0  d f16
#                2  scales_h u16   upper 2 bits of 8 scales, the first lowest
#                4  scales_l 4     lower 4 bits, two to a byte
#                8  qs 128         16 bytes for each 32 values, as IQ4_NL


@inlined
def _encode_iq4_xs(x: F32Tile, importance: Importance, y: ByteTile) -> None:
    w, scales = f32_tile(32), f32_tile(8)
    sigma2 = sum_of_squares(x, 0, 256) * floats(2.0 / 256)
    for j in range(8):
        store_weights_or_squares(x, importance, w, 32 * j, 32, sigma2)
        store(scales, j, _search_scale(x, w, 32 * j))
    d = signed_extreme(scales, 0, 8) / floats(-32.0)  # -0 in a block of zeros, as in ggml
    store_half(y, 0, d)
    inverse = inverse_or_zero(d)
    upper, lower = ints(0), ints(0)
    for j in range(8):
        level = clamp(nearest_int(inverse * load(scales, j)), ints(-32), ints(31))
        # The values are rounded for d in float32, not as FP16 will have it.
        _store_levels(x, y, 32 * j, 8 + 16 * j, inverse_or_zero(d * to_float(level)))
        level = level + ints(32)
        upper = upper | (bit_field(level, 4, 2) << ints(2 * j))
        lower = lower | (bit_field(level, 0, 4) << ints(4 * j))
    store_short(y, 2, upper)
    store_word(y, 4, lower)


@inlined
def _decode_iq4_xs(y: ByteTile, z: F32Tile) -> None:
    d, upper = load_half(y, 0), load_short(y, 2)
    for j in range(8):
        low = bit_field(load_bytes(y, 4 + j // 2), 4 * (j % 2), 4)
        high = bit_field(upper, 2 * j, 2)
        scale = d * to_float((low | (high << ints(4))) - ints(32))
        _load_levels(y, 8 + 16 * j, scale, z, 32 * j)


TYPES = {
    "IQ4_NL": define_type("IQ4_NL", _encode_iq4_nl, _decode_iq4_nl),
    "IQ4_XS": define_type("IQ4_XS", _encode_iq4_xs, _decode_iq4_xs),
}
