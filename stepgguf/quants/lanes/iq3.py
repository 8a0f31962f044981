"""IQ3_XXS, IQ3_S: groups of 4 values with a point of a grid, a sign for each value, a scale for 32 values.

    x[i] ~ +-d * (scale[j] + 1/2) / 2 * grid[point][i]      IQ3_XXS
    x[i] ~ +-d * (2 * scale[j] + 1) * grid[point][i]        IQ3_S

ggml tries a row of scales for each 32 values and snaps every group to the grid at each (lattice.py;
quantize_row_iq3_xxs_impl, quantize_row_iq3_s_impl in ggml-quants.c). Signs come in groups of 8, so points are kept in
pairs here: the code of the second in the upper 16 bits.
"""

from __future__ import annotations

from gguf.quants import IQ3_S, IQ3_XXS

from stepgguf.quants.lanes.blocks import (
    bit_field,
    highest_of,
    load_half,
    load_word,
    mean_square_of_block,
    nibbles,
    store_half,
    store_weights_or_squares,
    store_word,
)
from stepgguf.quants.lanes.compile import inlined
from stepgguf.quants.lanes.direct import make_direct_snap
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
from stepgguf.quants.lanes.lattice import ALL_IF_MOVED, MOVED, make_fit
from stepgguf.quants.lanes.operands import ByteTile, F32Tile, I32Lanes, I32Tile, Importance
from stepgguf.quants.lanes.vector import (
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

_GROUP_MAX_EPS_IQ3_XXS = 1e-8

_XXS, _S = Grid(IQ3_XXS, 2), Grid(IQ3_S, 3)
_fit_xxs = make_fit(_XXS, 8, numerators_around(15, 0.2, 15), MOVED, make_direct_snap(_XXS))
_fit_s = make_fit(_S, 8, numerators_around(15, 0.2, 9), ALL_IF_MOVED, make_direct_snap(_S))
_place_xxs, _place_s = make_place_point(_XXS), make_place_point(_S)


@inlined
def _pair_codes(codes: I32Tile, pairs: I32Tile, first: int) -> None:
    """Put the 8 codes of 32 values into the 4 pairs from vector `first` on."""
    for k in range(4):
        store(pairs, first + k, load(codes, 2 * k) | (load(codes, 2 * k + 1) << ints(16)))


@inlined
def _store_pair(y: ByteTile, i: int, pair: I32Lanes) -> None:
    """Put the lower 8 bits of both codes of a pair to bytes i and i + 1."""
    store_bytes(y, i, pair)
    store_bytes(y, i + 1, pair >> ints(16))


# IQ3_XXS --------------------------------------------------------------------------------------------------------
#
# block_iq3_xxs   0  d f16
#                 2  qs 64    a code of 8 bits for each 4 values
#                66  qs 32    a word for each 32 values: 4 x 7 signs, from bit 28 on the scale (scales_and_signs)


@inlined
def _encode_iq3_xxs(x: F32Tile, importance: Importance, y: ByteTile) -> None:
    w, v, scales = f32_tile(32), f32_tile(32), f32_tile(8)
    levels, signs, pairs, codes = i32_tile(8), i32_tile(32), i32_tile(32), i32_tile(8)
    sigma2 = mean_square_of_block(x, 2.0)
    for j in range(8):
        store_weights_or_squares(x, importance, w, 32 * j, 32, sigma2)
        for k in range(4):
            store(signs, 4 * j + k, split_signs(x, w, v, 32 * j, k, True))
        top = highest_of(v, 32)
        scale = _fit_xxs(v, w, top / floats(15.0), top, codes)
        _pair_codes(codes, pairs, 4 * j)
        is_zero = top < floats(_GROUP_MAX_EPS_IQ3_XXS)
        store(scales, j, make_scale_positive(scale, is_zero, signs, pairs, 4 * j, 4, 127))
    is_zero = highest_of(scales, 8) == floats(0.0)  # then every byte is
    store_half(y, 0, quantize_scales(scales, levels, 8) * floats(1.0125))  # ggml's correction of d
    for j in range(8):
        word = load(levels, j) << ints(28)
        for k in range(4):
            word = word | (load(signs, 4 * j + k) << ints(7 * k))
            _store_pair(y, 2 + 8 * j + 2 * k, where(is_zero, ints(0), load(pairs, 4 * j + k)))
        store_word(y, 66 + 4 * j, where(is_zero, ints(0), word))


@inlined
def _decode_iq3_xxs(y: ByteTile, z: F32Tile) -> None:
    d = load_half(y, 0)
    for j in range(8):
        word = load_word(y, 66 + 4 * j)
        scale = d * (floats(0.5) + to_float(word >> ints(28))) * floats(0.5)
        for k in range(8):
            # 7 bits for two groups of 4; the second group's signs are the upper half of the 8.
            signs = complete_signs(word >> ints(7 * (k // 2))) >> ints(4 * (k % 2))
            _place_xxs(z, 32 * j + 4 * k, scale, load_bytes(y, 2 + 8 * j + k), signs)


# IQ3_S ----------------------------------------------------------------------------------------------------------
#
# block_iq3_s     0  d f16
#                 2  qs 64      the codes' lower 8 bits
#                66  qh 8       the codes' upper bit: bit k of byte j is of group k of the 8 in 32 values
#                74  signs 32   bit i of a byte: value i of 8
#               106  scales 4   4 bits for each 32 values, the first in the lower


@inlined
def _close_gap(groups: I32Tile, j: int, place: I32Lanes) -> None:
    """Move the 4 groups of sub-block j to sub-block `place` <= j, and leave zeros where they were."""
    for k in range(4):
        group = load(groups, 4 * j + k)
        store(groups, 4 * j + k, ints(0))
        for to in range(j + 1):
            store(groups, 4 * to + k, where(place == ints(to), group, load(groups, 4 * to + k)))


@inlined
def _encode_iq3_s(x: F32Tile, importance: Importance, y: ByteTile) -> None:
    w, v, scales = f32_tile(32), f32_tile(32), f32_tile(8)
    levels, signs, pairs, codes = i32_tile(8), i32_tile(32), i32_tile(32), i32_tile(8)
    sigma2, place = mean_square_of_block(x, 2.0), ints(0)
    for j in range(8):
        store_weights_or_squares(x, importance, w, 32 * j, 32, sigma2)
        for k in range(4):
            store(signs, 4 * j + k, split_signs(x, w, v, 32 * j, k, False))
        top = highest_of(v, 32)
        is_zero = top == floats(0.0)
        scale = _fit_s(v, w, top / floats(15.0), top, codes)
        _pair_codes(codes, pairs, 4 * j)
        store(scales, j, make_scale_positive(scale, is_zero, signs, pairs, 4 * j, 4, 255))
        _store_upper_bits(pairs, j, y)
        # ggml steps over no bytes for 32 zeros: what follows is stored in their place, upper bits and scales are not.
        _close_gap(pairs, j, place)
        _close_gap(signs, j, place)
        place = place + where(is_zero, ints(0), ints(1))
    store_half(y, 0, quantize_scales(scales, levels, 8) * floats(1.033))  # ggml's correction of d
    for k in range(32):
        _store_pair(y, 2 + 2 * k, load(pairs, k))
        store_bytes(y, 74 + k, load(signs, k))
    for j in range(4):
        store_bytes(y, 106 + j, nibbles(load(levels, 2 * j), load(levels, 2 * j + 1)))


@inlined
def _store_upper_bits(pairs: I32Tile, j: int, y: ByteTile) -> None:
    """Put bit 8 of the 8 codes of sub-block j to its byte of qh."""
    upper = ints(0)
    for k in range(4):
        pair = load(pairs, 4 * j + k)
        upper = upper | (bit_field(pair, 8, 1) << ints(2 * k)) | ((pair >> ints(24)) << ints(2 * k + 1))
    store_bytes(y, 66 + j, upper)


@inlined
def _decode_iq3_s(y: ByteTile, z: F32Tile) -> None:
    d = load_half(y, 0)
    for j in range(8):
        level = bit_field(load_bytes(y, 106 + j // 2), 4 * (j % 2), 4)
        scale = d * to_float((level << ints(1)) | ints(1))
        for k in range(8):
            upper = bit_field(load_bytes(y, 66 + j), k, 1)
            signs = load_bytes(y, 74 + 4 * j + k // 2) >> ints(4 * (k % 2))
            _place_s(z, 32 * j + 4 * k, scale, load_bytes(y, 2 + 8 * j + k) | (upper << ints(8)), signs)


TYPES = {
    "IQ3_XXS": define_type("IQ3_XXS", _encode_iq3_xxs, _decode_iq3_xxs),
    "IQ3_S": define_type("IQ3_S", _encode_iq3_s, _decode_iq3_s),
}
