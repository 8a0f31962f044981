"""IQ4_NL, IQ4_XS: 16 levels with uneven steps, one scale for 32 values.

    x[i] ~ d * VALUES[level[i]]                     IQ4_NL: d f16 | qs 16
    x[i] ~ d * (scale[j] - 32) * VALUES[level[i]]   IQ4_XS: d f16 | upper 2 bits of 8 scales 2 | lower 4 bits 4 | qs 128

ggml fits a scale by least squares for each of 16 guesses, all of which put the largest value near the lowest level, and
then rounds anew for the scale as chosen (quantize_row_iq4_nl_impl in ggml-quants.c).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from gguf.quants import IQ4_NL

from stepgguf.quants.lanes.blocks import (
    extreme,
    inverse_or_zero,
    load_half,
    load_short,
    store_half,
    sum_of_squares,
    weigh_or_square,
)
from stepgguf.quants.lanes.compile import inlined
from stepgguf.quants.lanes.lanetype import lane_type
from stepgguf.quants.lanes.rounding import clamp, nearest_int, to_half
from stepgguf.quants.lanes.vector import (
    LANES,
    absolute,
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

_EPS = 1e-15  # GROUP_MAX_EPS
_GUESSES = 7  # to each side: the largest value becomes level VALUES[0] +- this
_VALUES = np.array(IQ4_NL.kvalues, np.float32)
# best_index_int8 compares the distances to both neighbours: exact differences there, so that is the middle.
_MIDDLES = (_VALUES[:-1] + _VALUES[1:]) / np.float32(2)


@inlined
def _level(v: Any) -> Any:
    """The level whose value is nearest to v, in an i32; of two as near, the higher. NaN gets the last."""
    level = ints(15)
    for i in range(14, -1, -1):
        level = where(v < floats(_MIDDLES[i]), ints(i), level)
    return level


@inlined
def _value(v: Any) -> Any:
    """The value of _level(v)."""
    value = floats(_VALUES[15])
    for i in range(14, -1, -1):
        value = where(v < floats(_MIDDLES[i]), floats(_VALUES[i]), value)
    return value


@inlined
def _fit(x: Any, w: Any, first: int, inverse: Any) -> Any:
    """Sums of weight * value * x and weight * value^2 for the 32 values from vector `first` of x on."""
    sum_vx, sum_v2 = floats(0.0), floats(0.0)
    for i in range(32):
        v = load(x, first + i)
        value = _value(inverse * v)
        weighted = load(w, i) * value
        sum_vx = sum_vx + weighted * v
        sum_v2 = sum_v2 + weighted * value
    return sum_vx, sum_v2


@inlined
def _search(x: Any, w: Any, first: int) -> Any:
    """The scale of the 32 values from vector `first` of x on. w [32]: weights."""
    zero = floats(0.0)
    top = extreme(x, first, 32)
    sum_vx, sum_v2 = _fit(x, w, first, floats(1.0) / (top / floats(-_VALUES[0])))
    scale = where(sum_v2 > zero, sum_vx / sum_v2, zero)
    best = scale * sum_vx
    for guess in range(-_GUESSES, _GUESSES + 1):
        sum_vx, sum_v2 = _fit(x, w, first, floats(guess + _VALUES[0]) / top)
        is_better = (sum_v2 > zero) & (sum_vx * sum_vx > best * sum_v2)
        scale = where(is_better, sum_vx / sum_v2, scale)
        best = where(is_better, scale * sum_vx, best)
    return where(absolute(top) < floats(_EPS), zero, scale)


@inlined
def _store_levels(x: Any, y: Any, first: int, place: int, inverse: Any) -> None:
    """16 bytes from y[place] on: levels i and i + 16 of the 32 values from vector `first` of x on."""
    for i in range(16):
        low, high = _level(inverse * load(x, first + i)), _level(inverse * load(x, first + 16 + i))
        store_bytes(y, place + i, low | (high << ints(4)))


@inlined
def _load_levels(y: Any, place: int, scale: Any, z: Any, first: int) -> None:
    """What _store_levels put into y, times the scale, to z from vector `first` on."""
    for i in range(16):
        levels = load_bytes(y, place + i)
        store(z, first + i, scale * gather(_VALUES, levels & ints(15)))
        store(z, first + 16 + i, scale * gather(_VALUES, levels >> ints(4)))


@inlined
def _encode_iq4_nl(x: Any, importance: Any, y: Any) -> None:
    w = np.empty(32 * LANES, np.float32)
    sigma2 = sum_of_squares(x, 0, 32) * floats(2.0 / 32)
    weigh_or_square(x, importance, w, 0, 32, sigma2)
    scale = _search(x, w, 0)
    store_half(y, 0, to_half(scale))
    _store_levels(x, y, 0, 2, inverse_or_zero(scale))


@inlined
def _encode_iq4_xs(x: Any, importance: Any, y: Any) -> None:
    w, scales = np.empty(32 * LANES, np.float32), np.empty(8 * LANES, np.float32)
    sigma2 = sum_of_squares(x, 0, 256) * floats(2.0 / 256)
    largest = floats(0.0)
    for j in range(8):
        weigh_or_square(x, importance, w, 32 * j, 32, sigma2)
        scale = _search(x, w, 32 * j)
        store(scales, j, scale)
        largest = where(absolute(scale) > absolute(largest), scale, largest)
    d = largest / floats(-32.0)  # -0 in a block of zeros, as in ggml
    store_half(y, 0, to_half(d))
    inverse = inverse_or_zero(d)
    upper, lower = ints(0), ints(0)
    for j in range(8):
        level = clamp(nearest_int(inverse * load(scales, j)), ints(-32), ints(31))
        _store_levels(x, y, 32 * j, 8 + 16 * j, inverse_or_zero(d * to_float(level)))
        level = level + ints(32)
        upper = upper | ((level >> ints(4)) << ints(2 * j))
        lower = lower | ((level & ints(15)) << ints(4 * j))
    store_half(y, 2, upper)
    for i in range(4):
        store_bytes(y, 4 + i, lower >> ints(8 * i))


@inlined
def _decode_iq4_nl(y: Any, z: Any) -> None:
    _load_levels(y, 2, load_half(y, 0), z, 0)


@inlined
def _decode_iq4_xs(y: Any, z: Any) -> None:
    d, upper = load_half(y, 0), load_short(y, 2)
    for j in range(8):
        low = (load_bytes(y, 4 + j // 2) >> ints(4 * (j % 2))) & ints(15)
        high = (upper >> ints(2 * j)) & ints(3)
        scale = d * to_float((low | (high << ints(4))) - ints(32))
        _load_levels(y, 8 + 16 * j, scale, z, 32 * j)


TYPES = {
    "IQ4_NL": lane_type("IQ4_NL", 32, 18, _encode_iq4_nl, _decode_iq4_nl),
    "IQ4_XS": lane_type("IQ4_XS", 256, 136, _encode_iq4_xs, _decode_iq4_xs),
}
