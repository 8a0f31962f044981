"""IQ3_XXS, IQ3_S: groups of 4 values with a point of a grid, a sign for each value, a scale for 32 values.

    x[i] ~ +-d * (scale[j] + 1/2) / 2 * grid[point][i]      IQ3_XXS
    x[i] ~ +-d * (2 * scale[j] + 1) * grid[point][i]        IQ3_S

ggml tries a row of scales for each 32 values and snaps every group to the grid at each (lattice.py;
quantize_row_iq3_xxs_impl, quantize_row_iq3_s_impl in ggml-quants.c). Signs come in groups of 8, so points are kept in
pairs here: the second in the upper 16 bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from gguf.quants import IQ3_S, IQ3_XXS

from stepgguf.quants.lanes.blocks import load_half, load_word, store_half, weigh_or_square
from stepgguf.quants.lanes.compile import inlined
from stepgguf.quants.lanes.direct import snapping
from stepgguf.quants.lanes.iq_blocks import (
    eight_signs,
    finish,
    largest,
    mean_square,
    numerators,
    placing,
    scale_levels,
    split_signs,
)
from stepgguf.quants.lanes.lanetype import lane_type
from stepgguf.quants.lanes.lattice import ALL_IF_MOVED, MOVED, Grid, lattice
from stepgguf.quants.lanes.rounding import to_half
from stepgguf.quants.lanes.vector import LANES, floats, ints, load, load_bytes, store, store_bytes, to_float, where

_EPS = 1e-8  # GROUP_MAX_EPS_IQ3_XXS

_XXS, _S = Grid(IQ3_XXS, 2), Grid(IQ3_S, 3)
_fit_xxs, _place_xxs = lattice(_XXS, 8, numerators(15, 0.2, 15), MOVED, snapping), placing(_XXS)
_fit_s, _place_s = lattice(_S, 8, numerators(15, 0.2, 9), ALL_IF_MOVED, snapping), placing(_S)


@inlined
def _pair(numbers: Any, pairs: Any, first: int) -> None:
    """8 points of 32 values to 4 pairs from vector `first` on."""
    for k in range(4):
        store(pairs, first + k, load(numbers, 2 * k) | (load(numbers, 2 * k + 1) << ints(16)))


# IQ3_XXS --------------------------------------------------------------------------------------------------------
#
#   d f16 | points 64 | 8 times (4 x 7 signs, 4 bits scale)


@inlined
def _encode_iq3_xxs(x: Any, importance: Any, y: Any) -> None:
    w, v = np.empty(32 * LANES, np.float32), np.empty(32 * LANES, np.float32)
    scales, levels = np.empty(8 * LANES, np.float32), np.empty(8 * LANES, np.int32)
    signs, pairs = np.empty(32 * LANES, np.int32), np.empty(32 * LANES, np.int32)
    numbers = np.empty(8 * LANES, np.int32)
    sigma2 = mean_square(x, 2.0)
    for j in range(8):
        weigh_or_square(x, importance, w, 32 * j, 32, sigma2)
        for k in range(4):
            store(signs, 4 * j + k, split_signs(x, w, v, 32 * j, k, True))
        top = largest(v, 32)
        scale = _fit_xxs(v, w, top / floats(15.0), top, numbers)
        _pair(numbers, pairs, 4 * j)
        store(scales, j, finish(scale, top < floats(_EPS), signs, pairs, 4 * j, 4, 127))
    is_zero = largest(scales, 8) == floats(0.0)
    d = scale_levels(scales, levels, 8)
    store_half(y, 0, to_half(d * floats(1.0125)))
    for j in range(8):
        word = load(levels, j) << ints(28)
        for k in range(4):
            word = word | (load(signs, 4 * j + k) << ints(7 * k))
            pair = where(is_zero, ints(0), load(pairs, 4 * j + k))
            store_bytes(y, 2 + 8 * j + 2 * k, pair)
            store_bytes(y, 3 + 8 * j + 2 * k, pair >> ints(16))
        for k in range(4):
            store_bytes(y, 66 + 4 * j + k, where(is_zero, ints(0), word >> ints(8 * k)))


@inlined
def _decode_iq3_xxs(y: Any, z: Any) -> None:
    d = load_half(y, 0)
    for j in range(8):
        word = load_word(y, 66 + 4 * j)
        scale = d * (floats(0.5) + to_float(word >> ints(28))) * floats(0.5)
        for k in range(8):
            signs = eight_signs(word >> ints(7 * (k // 2))) >> ints(4 * (k % 2))
            _place_xxs(z, 32 * j + 4 * k, scale, load_bytes(y, 2 + 8 * j + k), signs)


# IQ3_S ----------------------------------------------------------------------------------------------------------
#
#   d f16 | points' low 8 bits 64 | points' upper bit 8 | signs 32 | scales 4: 4 bits each for 32


@inlined
def _close_up(groups: Any, j: int, place: Any) -> None:
    """The 4 groups of sub-block j move to sub-block `place` <= j, where zeros are."""
    for k in range(4):
        group = load(groups, 4 * j + k)
        store(groups, 4 * j + k, ints(0))
        for to in range(j + 1):
            store(groups, 4 * to + k, where(place == ints(to), group, load(groups, 4 * to + k)))


@inlined
def _encode_iq3_s(x: Any, importance: Any, y: Any) -> None:
    w, v = np.empty(32 * LANES, np.float32), np.empty(32 * LANES, np.float32)
    scales, levels = np.empty(8 * LANES, np.float32), np.empty(8 * LANES, np.int32)
    signs, pairs = np.empty(32 * LANES, np.int32), np.empty(32 * LANES, np.int32)
    numbers = np.empty(8 * LANES, np.int32)
    sigma2, place = mean_square(x, 2.0), ints(0)
    for j in range(8):
        weigh_or_square(x, importance, w, 32 * j, 32, sigma2)
        for k in range(4):
            store(signs, 4 * j + k, split_signs(x, w, v, 32 * j, k, False))
        top = largest(v, 32)
        is_zero = top == floats(0.0)
        scale = _fit_s(v, w, top / floats(15.0), top, numbers)
        _pair(numbers, pairs, 4 * j)
        store(scales, j, finish(scale, is_zero, signs, pairs, 4 * j, 4, 255))
        upper = ints(0)
        for k in range(4):
            pair = load(pairs, 4 * j + k)
            upper = upper | (((pair >> ints(8)) & ints(1)) << ints(2 * k)) | ((pair >> ints(24)) << ints(2 * k + 1))
        store_bytes(y, 66 + j, upper)
        # ggml steps over no bytes for 32 zeros: what follows is stored in their place, upper bits and scales are not.
        _close_up(pairs, j, place)
        _close_up(signs, j, place)
        place = place + where(is_zero, ints(0), ints(1))
    store_half(y, 0, to_half(scale_levels(scales, levels, 8) * floats(1.033)))
    for k in range(32):
        pair = load(pairs, k)
        store_bytes(y, 2 + 2 * k, pair)
        store_bytes(y, 3 + 2 * k, pair >> ints(16))
        store_bytes(y, 74 + k, load(signs, k))
    for j in range(4):
        store_bytes(y, 106 + j, load(levels, 2 * j) | (load(levels, 2 * j + 1) << ints(4)))


@inlined
def _decode_iq3_s(y: Any, z: Any) -> None:
    d = load_half(y, 0)
    for j in range(8):
        level = (load_bytes(y, 106 + j // 2) >> ints(4 * (j % 2))) & ints(15)
        scale = d * to_float((level << ints(1)) | ints(1))
        for k in range(8):
            upper = (load_bytes(y, 66 + j) >> ints(k)) & ints(1)
            signs = load_bytes(y, 74 + 4 * j + k // 2) >> ints(4 * (k % 2))
            _place_s(z, 32 * j + 4 * k, scale, load_bytes(y, 2 + 8 * j + k) | (upper << ints(8)), signs)


TYPES = {
    "IQ3_XXS": lane_type("IQ3_XXS", 256, 98, _encode_iq3_xxs, _decode_iq3_xxs),
    "IQ3_S": lane_type("IQ3_S", 256, 110, _encode_iq3_s, _decode_iq3_s),
}
