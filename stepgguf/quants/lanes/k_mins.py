"""Q2_K, Q4_K, Q5_K: blocks of 256 whose sub-blocks have a scale and a minimum, both quantized themselves.

    x[i] ~ d * scale[j] * level[i] - dmin * min[j]        j: sub-block of i

ggml searches each sub-block's scale and minimum on a row of trial scales, by least squares at each, and then the two
super-block factors (search.py).
"""

from __future__ import annotations

from collections.abc import Callable

from stepgguf.quants.lanes.blocks import (
    bit_field,
    load_half,
    mean_square_of_block,
    nibbles,
    store_short,
    store_weights,
    sum_of_squares,
)
from stepgguf.quants.lanes.compile import inlined
from stepgguf.quants.lanes.lane_kernels import define_type
from stepgguf.quants.lanes.operands import ByteTile, F32Lanes, F32Tile, I32Lanes, I32Tile, Importance
from stepgguf.quants.lanes.rounding import clamp, from_half, nearest_int, to_half
from stepgguf.quants.lanes.search import MinimumSearch, make_minimum_search, quantize_positive
from stepgguf.quants.lanes.vector import (
    absolute,
    byte_tile,
    f32_tile,
    floats,
    i32_tile,
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
def _quantize_by_maximum(values: F32Tile, levels: I32Tile, n: int, highest: int) -> F32Lanes:
    """The factor of n values >= 0 such that the largest gets the highest level; their levels go to `levels` [n]."""
    zero = floats(0.0)
    high = zero  # unlike in highest_of, ggml passes over every NaN here
    for i in range(n):
        v = load(values, i)
        high = where(v > high, v, high)
    inverse = where(high > zero, floats(highest) / high, zero)
    for i in range(n):
        level = nearest_int(inverse * load(values, i)) & ints(0xFF)
        store(levels, i, where(level > ints(highest), ints(highest), level))
    return high / floats(highest)


@inlined
def _requantize(
    x: F32Tile, levels: ByteTile, first: int, n: int, scale: F32Lanes, minimum: F32Lanes, highest: int
) -> None:
    """Round the levels anew for the scale and minimum as they are stored; where the scale is 0 the search's stay."""
    is_zero = scale == floats(0.0)
    for i in range(first, first + n):
        level = clamp(nearest_int((load(x, i) + minimum) / scale), ints(0), ints(highest))
        store_bytes(levels, i, where(is_zero, load_bytes(levels, i), level))


# store_plain_weights(x, w, first): the weights w of a sub-block's values from vector `first` on, without importance.
StorePlainWeights = Callable[[F32Tile, F32Tile, int], None]
# quantize(x, importance, levels, scale_levels, minimum_levels) -> (d, dmin) as the bits of FP16
Quantize = Callable[[F32Tile, Importance, ByteTile, I32Tile, I32Tile], tuple[I32Lanes, I32Lanes]]


def _make_quantize(
    n: int,
    highest: int,
    highest_factor: int,
    sigma_factor: float,
    store_plain_weights: StorePlainWeights,
    search: MinimumSearch,
    weighted_search: MinimumSearch,
) -> Quantize:
    """A part of kernels that does all for a block of 256 in n sub-blocks but pack it.

    highest, highest_factor     the highest level of a value; of a sub-block's scale and minimum
    sigma_factor                by which ggml multiplies the mean square in weights with importance
    search, weighted_search     without and with importance
    """
    size = 256 // n

    @inlined
    def quantize(
        x: F32Tile, importance: Importance, levels: ByteTile, scale_levels: I32Tile, minimum_levels: I32Tile
    ) -> tuple[I32Lanes, I32Lanes]:
        w, tried, scales, minimums, sums = f32_tile(size), f32_tile(size), f32_tile(n), f32_tile(n), f32_tile(n)
        sigma2 = mean_square_of_block(x, sigma_factor)
        for j in range(n):
            if importance is None:
                store_plain_weights(x, w, size * j)
                scale, minimum = search(x, w, levels, tried, size * j, size)
            else:
                store(sums, j, store_weights(x, importance, w, size * j, size, sigma2))
                scale, minimum = weighted_search(x, w, levels, tried, size * j, size)
            store(scales, j, scale)
            store(minimums, j, floats(0.0) - minimum)  # stored as what is subtracted: never below 0
        if importance is None:
            d = to_half(_quantize_by_maximum(scales, scale_levels, n, highest_factor))
            dmin = to_half(_quantize_by_maximum(minimums, minimum_levels, n, highest_factor))
        else:
            d = to_half(quantize_positive(scales, sums, scale_levels, n, highest_factor))
            dmin = to_half(quantize_positive(minimums, sums, minimum_levels, n, highest_factor))
        for j in range(n):
            this_scale = from_half(d) * to_float(load(scale_levels, j))
            this_minimum = from_half(dmin) * to_float(load(minimum_levels, j))
            _requantize(x, levels, size * j, size, this_scale, this_minimum, highest)
        return d, dmin

    return quantize


# Q4_K and Q5_K --------------------------------------------------------------------------------------------------
#
# block_q4_K, block_q5_K     0  d f16
#                            2  dmin f16
#                            4  scales 12    6 bits each for 8 scales and 8 minimums (get_scale_min_k4):
#                                            j and j + 4 for j = 0..3    4 + j     scale j | upper 2 of scale j + 4
#                                                                        8 + j     minimum j | upper 2 of minimum j + 4
#                                                                       12 + j     lower 4 of both j + 4
#   Q4_K                    16  qs 128       byte 32 c + i has levels 64 c + i and 64 c + 32 + i
#   Q5_K                    16  qh 32        bit k of byte i: the upper bit of level 32 k + i
#                           48  qs 128       the lower 4 bits, as Q4_K


@inlined
def _store_average_weights(x: F32Tile, w: F32Tile, first: int) -> None:
    """Weigh each value by the root of the mean square of its sub-block plus its own size."""
    average = sqrt(sum_of_squares(x, first, 32) / floats(32.0))
    for i in range(32):
        store(w, i, average + absolute(load(x, first + i)))


@inlined
def _pack_factors(d: I32Lanes, dmin: I32Lanes, scale_levels: I32Tile, minimum_levels: I32Tile, y: ByteTile) -> None:
    """Pack d, dmin and the 6-bit factors of 8 sub-blocks into the first 16 bytes of a block."""
    store_short(y, 0, d)
    store_short(y, 2, dmin)
    for j in range(4):
        low_scale, high_scale = load(scale_levels, j), load(scale_levels, j + 4)
        low_minimum, high_minimum = load(minimum_levels, j), load(minimum_levels, j + 4)
        store_bytes(y, 4 + j, low_scale | (bit_field(high_scale, 4, 2) << ints(6)))
        store_bytes(y, 8 + j, low_minimum | (bit_field(high_minimum, 4, 2) << ints(6)))
        store_bytes(y, 12 + j, nibbles(high_scale, high_minimum))


@inlined
def _load_factors(y: ByteTile, j: int) -> tuple[F32Lanes, F32Lanes]:
    """(d * scale, dmin * minimum) of sub-block j."""
    if j < 4:
        scale, minimum = bit_field(load_bytes(y, 4 + j), 0, 6), bit_field(load_bytes(y, 8 + j), 0, 6)
    else:
        low = load_bytes(y, 8 + j)
        scale = bit_field(low, 0, 4) | (bit_field(load_bytes(y, j), 6, 2) << ints(4))
        minimum = bit_field(low, 4, 4) | (bit_field(load_bytes(y, 4 + j), 6, 2) << ints(4))
    return load_half(y, 0) * to_float(scale), load_half(y, 2) * to_float(minimum)


_quantize_q4_k = _make_quantize(
    8,
    15,
    63,
    2.0,
    _store_average_weights,
    make_minimum_search(15, -1.0, 0.1, 21),
    make_minimum_search(15, -0.9, 0.05, 37),
)


@inlined
def _encode_q4_k(x: F32Tile, importance: Importance, y: ByteTile) -> None:
    levels, scale_levels, minimum_levels = byte_tile(256), i32_tile(8), i32_tile(8)
    d, dmin = _quantize_q4_k(x, importance, levels, scale_levels, minimum_levels)
    _pack_factors(d, dmin, scale_levels, minimum_levels, y)
    for j in range(4):
        for i in range(32):
            low, high = load_bytes(levels, 64 * j + i), load_bytes(levels, 64 * j + 32 + i)
            store_bytes(y, 16 + 32 * j + i, nibbles(low, high))


@inlined
def _decode_q4_k(y: ByteTile, z: F32Tile) -> None:
    for j in range(8):
        scale, minimum = _load_factors(y, j)
        for i in range(32):
            level = bit_field(load_bytes(y, 16 + j // 2 * 32 + i), 4 * (j % 2), 4)
            store(z, 32 * j + i, scale * to_float(level) - minimum)


_quantize_q5_k = _make_quantize(
    8,
    31,
    63,
    2.0,
    _store_average_weights,
    make_minimum_search(31, -0.5, 0.1, 16),
    make_minimum_search(31, -0.9, 0.05, 37),
)


@inlined
def _encode_q5_k(x: F32Tile, importance: Importance, y: ByteTile) -> None:
    levels, scale_levels, minimum_levels = byte_tile(256), i32_tile(8), i32_tile(8)
    d, dmin = _quantize_q5_k(x, importance, levels, scale_levels, minimum_levels)
    _pack_factors(d, dmin, scale_levels, minimum_levels, y)
    for i in range(32):
        upper = ints(0)
        for j in range(4):
            low, high = load_bytes(levels, 64 * j + i), load_bytes(levels, 64 * j + 32 + i)
            store_bytes(y, 48 + 32 * j + i, nibbles(low, high))
            upper = upper | ((low >> ints(4)) << ints(2 * j)) | ((high >> ints(4)) << ints(2 * j + 1))
        store_bytes(y, 16 + i, upper)


@inlined
def _decode_q5_k(y: ByteTile, z: F32Tile) -> None:
    for j in range(8):
        scale, minimum = _load_factors(y, j)
        for i in range(32):
            level = bit_field(load_bytes(y, 48 + j // 2 * 32 + i), 4 * (j % 2), 4)
            upper = bit_field(load_bytes(y, 16 + i), j, 1)
            store(z, 32 * j + i, scale * to_float(level | (upper << ints(4))) - minimum)


# Q2_K -----------------------------------------------------------------------------------------------------------
#
# block_q2_K     0  scales 16    lower 4 bits: scale, upper 4: minimum
#               16  qs 64        byte 32 h + i has levels 128 h + i + (0, 32, 64, 96)
#               80  d f16
#               82  dmin f16


@inlined
def _store_size_weights(x: F32Tile, w: F32Tile, first: int) -> None:
    """Weigh each value by its size."""
    for i in range(16):
        store(w, i, absolute(load(x, first + i)))


_quantize_q2_k = _make_quantize(
    16,
    3,
    15,
    1.0,
    _store_size_weights,
    make_minimum_search(3, -0.5, 0.1, 16, by_size=True),
    make_minimum_search(3, -0.9, 0.05, 37),
)


@inlined
def _encode_q2_k(x: F32Tile, importance: Importance, y: ByteTile) -> None:
    levels, scale_levels, minimum_levels = byte_tile(256), i32_tile(16), i32_tile(16)
    d, dmin = _quantize_q2_k(x, importance, levels, scale_levels, minimum_levels)
    for j in range(16):
        store_bytes(y, j, nibbles(load(scale_levels, j), load(minimum_levels, j)))
    for j in range(2):
        for i in range(32):
            packed = ints(0)
            for k in range(4):
                packed = packed | (load_bytes(levels, 128 * j + 32 * k + i) << ints(2 * k))
            store_bytes(y, 16 + 32 * j + i, packed)
    store_short(y, 80, d)
    store_short(y, 82, dmin)


@inlined
def _decode_q2_k(y: ByteTile, z: F32Tile) -> None:
    d, dmin = load_half(y, 80), load_half(y, 82)
    for j in range(16):
        packed = load_bytes(y, j)
        scale, minimum = d * to_float(bit_field(packed, 0, 4)), dmin * to_float(bit_field(packed, 4, 4))
        for i in range(16):
            # Value 16 j + i: j // 8 is its half of the block, j % 2 * 16 + i its place in 32, j % 8 // 2 which 32.
            level = bit_field(load_bytes(y, 16 + j // 8 * 32 + j % 2 * 16 + i), j % 8 // 2 * 2, 2)
            store(z, 16 * j + i, scale * to_float(level) - minimum)


TYPES = {
    "Q2_K": define_type("Q2_K", _encode_q2_k, _decode_q2_k),
    "Q4_K": define_type("Q4_K", _encode_q4_k, _decode_q4_k),
    "Q5_K": define_type("Q5_K", _encode_q5_k, _decode_q5_k),
}
