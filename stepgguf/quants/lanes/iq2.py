"""IQ2_XXS, IQ2_XS, IQ2_S: groups of 8 values with 8 signs and a point of a grid, a scale for 32 or 16 values.

    x[i] ~ +-d * (scale[j] + 1/2) / 4 * grid[point][i]

ggml tries a row of scales for each sub-block and snaps every group to the grid at each (lattice.py;
quantize_row_iq2_xxs_impl, quantize_row_iq2_xs_impl, quantize_row_iq2_s_impl in ggml-quants.c).
"""

from __future__ import annotations

from collections.abc import Callable

from gguf.quants import IQ2_S, IQ2_XS, IQ2_XXS

from stepgguf.quants.lanes.blocks import (
    bit_field,
    highest_of,
    load_half,
    load_short,
    load_word,
    mean_square_of_block,
    nibbles,
    store_half,
    store_short,
    store_weights,
    store_word,
)
from stepgguf.quants.lanes.compile import inlined
from stepgguf.quants.lanes.grid import Grid
from stepgguf.quants.lanes.iq_blocks import (
    complete_signs,
    make_place_point,
    make_scale_positive,
    numerators_around,
    quantize_scales,
    split_signs,
)
from stepgguf.quants.lanes.lane_kernels import define_type
from stepgguf.quants.lanes.lattice import ALL, MOVED, Fit, make_fit, make_snap
from stepgguf.quants.lanes.operands import ByteTile, F32Lanes, F32Tile, I32Lanes, I32Tile, Importance
from stepgguf.quants.lanes.search import GROUP_MAX_EPS, quantize_positive
from stepgguf.quants.lanes.vector import (
    LANES,
    f32_tile,
    floats,
    i32_tile,
    ints,
    load,
    load_bytes,
    store,
    store_bytes,
    to_float,
    where,
)

_GROUP_MAX_EPS_IQ2_S = 1e-8

_XXS, _XS, _S = Grid(IQ2_XXS, 2), Grid(IQ2_XS, 2), Grid(IQ2_S, 1)
_fit_xxs = make_fit(_XXS, 4, numerators_around(5, 0.1, 6), ALL, make_snap(_XXS))
_place_xxs, _place_xs, _place_s = make_place_point(_XXS), make_place_point(_XS), make_place_point(_S)


@inlined
def _store_weights(x: F32Tile, importance: Importance, w: F32Tile, first: int, n: int, sigma2: F32Lanes) -> None:
    """Put the weights of the n values from vector `first` of x on to w. Only IQ2_S does without importance."""
    if importance is None:
        for i in range(n):
            value = load(x, first + i)
            store(w, i, floats(0.25) * sigma2 + value * value)
    else:
        store_weights(x, importance, w, first, n, sigma2)


@inlined
def _scale_of(d: F32Lanes, level: I32Lanes) -> F32Lanes:
    """The scale that 4 bits stand for."""
    return d * (floats(0.5) + to_float(level)) * floats(0.25)


# IQ2_XXS --------------------------------------------------------------------------------------------------------
#
# block_iq2_xxs   0  d f16
#                 2  qs 64    8 bytes for each 32 values: 4 codes | a word of 4 x 7 signs, from bit 28 on the scale


@inlined
def _encode_iq2_xxs(x: F32Tile, importance: Importance, y: ByteTile) -> None:
    w, v, scales = f32_tile(32), f32_tile(32), f32_tile(8)
    # levels: first of the 32 values, for a scale to begin with; at the end of the 8 scales.
    levels, signs, codes = i32_tile(32), i32_tile(32), i32_tile(32)
    sigma2 = mean_square_of_block(x, 1.0)
    for j in range(8):
        _store_weights(x, importance, w, 32 * j, 32, sigma2)
        for k in range(4):
            store(signs, 4 * j + k, split_signs(x, w, v, 32 * j, k, True))
        scale = quantize_positive(v, w, levels, 32, 4)
        top = scale * floats(3.0)
        is_zero = (highest_of(v, 32) < floats(GROUP_MAX_EPS)) | (top <= floats(0.0))
        scale = _fit_xxs(v, w, scale, top, codes[4 * j * LANES :])
        store(scales, j, make_scale_positive(scale, is_zero, signs, codes, 4 * j, 4, 127))
    d = quantize_scales(scales, levels, 8)
    is_zero = d == floats(0.0)  # then every byte is, though code 0 with no signs is no group of zeros
    store_half(y, 0, d)
    for j in range(8):
        word = load(levels, j) << ints(28)
        for k in range(4):
            word = word | (load(signs, 4 * j + k) << ints(7 * k))
            store_bytes(y, 2 + 8 * j + k, where(is_zero, ints(0), load(codes, 4 * j + k)))
        store_word(y, 6 + 8 * j, where(is_zero, ints(0), word))


@inlined
def _decode_iq2_xxs(y: ByteTile, z: F32Tile) -> None:
    d = load_half(y, 0)
    for j in range(8):
        word = load_word(y, 6 + 8 * j)
        scale = _scale_of(d, word >> ints(28))
        for k in range(4):
            signs = complete_signs(word >> ints(7 * k))
            _place_xxs(z, 32 * j + 8 * k, scale, load_bytes(y, 2 + 8 * j + k), signs)


# IQ2_XS and IQ2_S -----------------------------------------------------------------------------------------------
#
# block_iq2_xs    0  d f16
#                 2  qs 64      2 bytes for each group: 9 bits code, 7 signs
#                66  scales 8   4 bits for each 16 values, the first in the lower
#
# block_iq2_s     0  d f16
#                 2  qs 64      the codes' lower 8 bits 32 | signs 32
#                66  qh 8       the codes' upper 2 bits, 4 groups to a byte, the first lowest
#                74  scales 8   as IQ2_XS


@inlined
def _store_scales(levels: I32Tile, y: ByteTile, first: int) -> None:
    """Pack 16 scales of 4 bits into the 8 bytes from y[first] on."""
    for j in range(8):
        store_bytes(y, first + j, nibbles(load(levels, 2 * j), load(levels, 2 * j + 1)))


@inlined
def _load_scale(y: ByteTile, first: int, k: int) -> F32Lanes:
    """The scale of group k; two groups share one."""
    return _scale_of(load_half(y, 0), bit_field(load_bytes(y, first + k // 4), 4 * (k // 2 % 2), 4))


# fit_block(x, importance, scales, signs, codes), as _make_fit_block says.
FitBlock = Callable[[F32Tile, Importance, F32Tile, I32Tile, I32Tile], None]


def _make_fit_block(fit: Fit, sigma_factor: float, smallest: float, sign_bits: int) -> FitBlock:
    """The search in all 16 sub-blocks of 16 values, which gives their scales [16], signs [32] and codes [32].

    sigma_factor    by which ggml multiplies the mean square in weights
    smallest        a sub-block of values below this is zero
    sign_bits       127 where a file has 7 signs for 8 values, else 255
    """

    @inlined
    def fit_block(x: F32Tile, importance: Importance, scales: F32Tile, signs: I32Tile, codes: I32Tile) -> None:
        w, v = f32_tile(16), f32_tile(16)
        sigma2 = mean_square_of_block(x, sigma_factor)
        for j in range(16):
            _store_weights(x, importance, w, 16 * j, 16, sigma2)
            for k in range(2):
                store(signs, 2 * j + k, split_signs(x, w, v, 16 * j, k, sign_bits == 127))
            top = highest_of(v, 16)
            scale = fit(v, w, top / floats(5.0), top, codes[2 * j * LANES :])
            is_zero = top < floats(smallest)
            store(scales, j, make_scale_positive(scale, is_zero, signs, codes, 2 * j, 2, sign_bits))

    return fit_block


_fit_block_xs = _make_fit_block(
    make_fit(_XS, 2, numerators_around(5, 0.1, 9), MOVED, make_snap(_XS)), 1.0, GROUP_MAX_EPS, 127
)
_fit_block_s = _make_fit_block(
    make_fit(_S, 2, numerators_around(5, 0.1, 9), MOVED, make_snap(_S)), 2.0, _GROUP_MAX_EPS_IQ2_S, 255
)


@inlined
def _encode_iq2_xs(x: F32Tile, importance: Importance, y: ByteTile) -> None:
    scales, levels, signs, codes = f32_tile(16), i32_tile(16), i32_tile(32), i32_tile(32)
    _fit_block_xs(x, importance, scales, signs, codes)
    d = quantize_scales(scales, levels, 16)
    is_zero = d == floats(0.0)  # then every byte is
    store_half(y, 0, d)
    for k in range(32):
        store_short(y, 2 + 2 * k, where(is_zero, ints(0), load(codes, k) | (load(signs, k) << ints(9))))
    _store_scales(levels, y, 66)


@inlined
def _decode_iq2_xs(y: ByteTile, z: F32Tile) -> None:
    for k in range(32):
        word = load_short(y, 2 + 2 * k)
        _place_xs(z, 8 * k, _load_scale(y, 66, k), bit_field(word, 0, 9), complete_signs(word >> ints(9)))


@inlined
def _encode_iq2_s(x: F32Tile, importance: Importance, y: ByteTile) -> None:
    scales, levels, signs, codes = f32_tile(16), i32_tile(16), i32_tile(32), i32_tile(32)
    _fit_block_s(x, importance, scales, signs, codes)
    # ggml's correction of d; IQ3 has such factors as well.
    store_half(y, 0, quantize_scales(scales, levels, 16) * floats(0.9875))
    for j in range(8):
        upper = ints(0)
        for k in range(4):
            code = load(codes, 4 * j + k)
            upper = upper | ((code >> ints(8)) << ints(2 * k))
            store_bytes(y, 2 + 4 * j + k, code)
            store_bytes(y, 34 + 4 * j + k, load(signs, 4 * j + k))
        store_bytes(y, 66 + j, upper)
    _store_scales(levels, y, 74)


@inlined
def _decode_iq2_s(y: ByteTile, z: F32Tile) -> None:
    for k in range(32):
        upper = bit_field(load_bytes(y, 66 + k // 4), 2 * (k % 4), 2)
        code = load_bytes(y, 2 + k) | (upper << ints(8))
        _place_s(z, 8 * k, _load_scale(y, 74, k), code, load_bytes(y, 34 + k))


TYPES = {
    "IQ2_XXS": define_type("IQ2_XXS", _encode_iq2_xxs, _decode_iq2_xxs),
    "IQ2_XS": define_type("IQ2_XS", _encode_iq2_xs, _decode_iq2_xs),
    "IQ2_S": define_type("IQ2_S", _encode_iq2_s, _decode_iq2_s),
}
