"""IQ2_XXS, IQ2_XS, IQ2_S: groups of 8 values with 8 signs and a point of a grid, a scale for 32 or 16 values.

    x[i] ~ +-d * (scale[j] + 1/2) / 4 * grid[point][i]

ggml tries a row of scales for each sub-block and snaps every group to the grid at each (lattice.py;
quantize_row_iq2_xxs_impl, quantize_row_iq2_xs_impl, quantize_row_iq2_s_impl in ggml-quants.c).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from gguf.quants import IQ2_S, IQ2_XS, IQ2_XXS

from stepgguf.quants.lanes.blocks import load_half, load_short, load_word, store_half, weigh
from stepgguf.quants.lanes.compile import inlined
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
from stepgguf.quants.lanes.lattice import ALL, MOVED, Grid, lattice
from stepgguf.quants.lanes.rounding import to_half
from stepgguf.quants.lanes.search import quantize_positive
from stepgguf.quants.lanes.vector import LANES, floats, ints, load, load_bytes, store, store_bytes, to_float, where

_EPS = 1e-15  # GROUP_MAX_EPS
_EPS_S = 1e-8  # GROUP_MAX_EPS_IQ2_S

_XXS, _XS, _S = Grid(IQ2_XXS, 2), Grid(IQ2_XS, 2), Grid(IQ2_S, 1)
_fit_xxs, _place_xxs = lattice(_XXS, 4, numerators(5, 0.1, 6), ALL), placing(_XXS)
_fit_xs, _place_xs = lattice(_XS, 2, numerators(5, 0.1, 9), MOVED), placing(_XS)
_fit_s, _place_s = lattice(_S, 2, numerators(5, 0.1, 9), MOVED), placing(_S)


@inlined
def _weigh(x: Any, importance: Any, w: Any, first: int, n: int, sigma2: Any) -> None:
    """w [n] for the values from vector `first` of x on. Only IQ2_S does without importance."""
    if importance is None:
        for i in range(n):
            value = load(x, first + i)
            store(w, i, floats(0.25) * sigma2 + value * value)
    else:
        weigh(x, importance, w, first, n, sigma2)


@inlined
def _scale(d: Any, level: Any) -> Any:
    return d * (floats(0.5) + to_float(level)) * floats(0.25)


# IQ2_XXS --------------------------------------------------------------------------------------------------------
#
#   d f16 | 8 times (4 points of 8 bits | 4 x 7 signs, 4 bits scale)


@inlined
def _encode_iq2_xxs(x: Any, importance: Any, y: Any) -> None:
    w, v = np.empty(32 * LANES, np.float32), np.empty(32 * LANES, np.float32)
    scales, levels = np.empty(8 * LANES, np.float32), np.empty(32 * LANES, np.int32)
    signs, numbers = np.empty(32 * LANES, np.int32), np.empty(32 * LANES, np.int32)
    sigma2 = mean_square(x, 1.0)
    for j in range(8):
        _weigh(x, importance, w, 32 * j, 32, sigma2)
        for k in range(4):
            store(signs, 4 * j + k, split_signs(x, w, v, 32 * j, k, True))
        scale = quantize_positive(v, w, levels, 32, 4)
        top = scale * floats(3.0)
        is_zero = (largest(v, 32) < floats(_EPS)) | (top <= floats(0.0))
        scale = _fit_xxs(v, w, scale, top, numbers[4 * j * LANES :])
        store(scales, j, finish(scale, is_zero, signs, numbers, 4 * j, 4, 127))
    d = scale_levels(scales, levels, 8)
    is_zero = d == floats(0.0)
    store_half(y, 0, to_half(d))
    for j in range(8):
        word = load(levels, j) << ints(28)
        for k in range(4):
            word = word | (load(signs, 4 * j + k) << ints(7 * k))
            store_bytes(y, 2 + 8 * j + k, where(is_zero, ints(0), load(numbers, 4 * j + k)))
        for k in range(4):
            store_bytes(y, 6 + 8 * j + k, where(is_zero, ints(0), word >> ints(8 * k)))


@inlined
def _decode_iq2_xxs(y: Any, z: Any) -> None:
    d = load_half(y, 0)
    for j in range(8):
        word = load_word(y, 6 + 8 * j)
        scale = _scale(d, word >> ints(28))
        for k in range(4):
            signs = eight_signs(word >> ints(7 * k))
            _place_xxs(z, 32 * j + 8 * k, scale, load_bytes(y, 2 + 8 * j + k), signs)


# IQ2_XS and IQ2_S -----------------------------------------------------------------------------------------------
#
#   IQ2_XS    d f16 | 32 times (point 9 bits, 7 signs) | scales 8: 4 bits each for 16
#   IQ2_S     d f16 | points' low 8 bits 32 | signs 32 | points' upper 2 bits 8 | scales 8: 4 bits each for 16


@inlined
def _store_scales(levels: Any, y: Any, first: int) -> None:
    for j in range(8):
        store_bytes(y, first + j, load(levels, 2 * j) | (load(levels, 2 * j + 1) << ints(4)))


@inlined
def _load_scale(y: Any, first: int, k: int) -> Any:
    """The scale of group k; two groups share one."""
    return _scale(load_half(y, 0), (load_bytes(y, first + k // 4) >> ints(4 * (k // 2 % 2))) & ints(15))


@inlined
def _encode_iq2_xs(x: Any, importance: Any, y: Any) -> None:
    w, v = np.empty(16 * LANES, np.float32), np.empty(16 * LANES, np.float32)
    scales, levels = np.empty(16 * LANES, np.float32), np.empty(16 * LANES, np.int32)
    signs, numbers = np.empty(32 * LANES, np.int32), np.empty(32 * LANES, np.int32)
    sigma2 = mean_square(x, 1.0)
    for j in range(16):
        _weigh(x, importance, w, 16 * j, 16, sigma2)
        for k in range(2):
            store(signs, 2 * j + k, split_signs(x, w, v, 16 * j, k, True))
        top = largest(v, 16)
        scale = _fit_xs(v, w, top / floats(5.0), top, numbers[2 * j * LANES :])
        store(scales, j, finish(scale, top < floats(_EPS), signs, numbers, 2 * j, 2, 127))
    d = scale_levels(scales, levels, 16)
    is_zero = d == floats(0.0)
    store_half(y, 0, to_half(d))
    for k in range(32):
        store_half(y, 2 + 2 * k, where(is_zero, ints(0), load(numbers, k) | (load(signs, k) << ints(9))))
    _store_scales(levels, y, 66)


@inlined
def _decode_iq2_xs(y: Any, z: Any) -> None:
    for k in range(32):
        word = load_short(y, 2 + 2 * k)
        _place_xs(z, 8 * k, _load_scale(y, 66, k), word & ints(511), eight_signs(word >> ints(9)))


@inlined
def _encode_iq2_s(x: Any, importance: Any, y: Any) -> None:
    w, v = np.empty(16 * LANES, np.float32), np.empty(16 * LANES, np.float32)
    scales, levels = np.empty(16 * LANES, np.float32), np.empty(16 * LANES, np.int32)
    signs, numbers = np.empty(32 * LANES, np.int32), np.empty(32 * LANES, np.int32)
    sigma2 = mean_square(x, 2.0)
    for j in range(16):
        _weigh(x, importance, w, 16 * j, 16, sigma2)
        for k in range(2):
            store(signs, 2 * j + k, split_signs(x, w, v, 16 * j, k, False))
        top = largest(v, 16)
        scale = _fit_s(v, w, top / floats(5.0), top, numbers[2 * j * LANES :])
        store(scales, j, finish(scale, top < floats(_EPS_S), signs, numbers, 2 * j, 2, 255))
    store_half(y, 0, to_half(scale_levels(scales, levels, 16) * floats(0.9875)))
    for j in range(8):
        upper = ints(0)
        for k in range(4):
            number = load(numbers, 4 * j + k)
            upper = upper | ((number >> ints(8)) << ints(2 * k))
            store_bytes(y, 2 + 4 * j + k, number)
            store_bytes(y, 34 + 4 * j + k, load(signs, 4 * j + k))
        store_bytes(y, 66 + j, upper)
    _store_scales(levels, y, 74)


@inlined
def _decode_iq2_s(y: Any, z: Any) -> None:
    for k in range(32):
        upper = (load_bytes(y, 66 + k // 4) >> ints(2 * (k % 4))) & ints(3)
        number = load_bytes(y, 2 + k) | (upper << ints(8))
        _place_s(z, 8 * k, _load_scale(y, 74, k), number, load_bytes(y, 34 + k))


TYPES = {
    "IQ2_XXS": lane_type("IQ2_XXS", 256, 66, _encode_iq2_xxs, _decode_iq2_xxs),
    "IQ2_XS": lane_type("IQ2_XS", 256, 74, _encode_iq2_xs, _decode_iq2_xs),
    "IQ2_S": lane_type("IQ2_S", 256, 82, _encode_iq2_s, _decode_iq2_s),
}
