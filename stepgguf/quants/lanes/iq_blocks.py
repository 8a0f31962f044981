"""What the blocks of IQ2 and IQ3 share: signs apart from sizes, 4 bits for each scale, and points back to numbers.

Where a file has only 7 bits for 8 signs, their product must be +1: if it is not, the value that costs least takes the
wrong sign (quantize_row_iq2_xxs_impl in ggml-quants.c).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from stepgguf.quants.lanes.blocks import bit_field, highest_of
from stepgguf.quants.lanes.compile import inlined
from stepgguf.quants.lanes.grid import Grid, embedded_array
from stepgguf.quants.lanes.operands import F32Lanes, F32Tile, I32Lanes, I32Tile, Mask
from stepgguf.quants.lanes.rounding import clamp, nearest_int
from stepgguf.quants.lanes.vector import bits_of, float_of_bits, floats, gather, ints, load, store, to_float, where

_SIGN_BIT = -(2**31)


def numerators_around(middle: float, step: float, n: int) -> NDArray[np.float32]:
    """middle + step * i for i from -n to n, in float32 as C adds them: trial inverse scales times the largest value."""
    numerators: NDArray[np.float32] = np.float32(middle) + np.float32(step) * np.arange(-n, n + 1, dtype=np.float32)
    return numerators


# signs ----------------------------------------------------------------------------------------------------------


@inlined
def _negated(v: F32Lanes) -> F32Lanes:
    """-v, of zeros too: 0 - v would lose the sign of -0."""
    return float_of_bits(bits_of(v) ^ ints(_SIGN_BIT))


@inlined
def _parity(signs: I32Lanes) -> I32Lanes:
    """1 if an odd number of the 8 bits is set, else 0."""
    for shift in (4, 2, 1):
        signs = signs ^ (signs >> ints(shift))
    return signs & ints(1)


@inlined
def split_signs(x: F32Tile, w: F32Tile, v: F32Tile, first: int, k: int, is_even: bool) -> I32Lanes:
    """The signs of group k of the values from vector `first` of x on, 1 for a minus; their sizes go to v.

    is_even: the number of signs is made even by a wrong one, where it costs least; then 7 of them are returned. That
    value's "size" becomes negative, so the search goes on with what the block can hold.
    """
    signs = ints(0)
    for i in range(8):
        value = load(x, first + 8 * k + i)
        is_negative = value < floats(0.0)
        store(v, 8 * k + i, where(is_negative, _negated(value), value))
        signs = signs | where(is_negative, ints(1 << i), ints(0))
    if is_even:
        cheapest = _cheapest_sign(x, w, first, k)
        is_odd = _parity(signs) != ints(0)
        for i in range(8):
            value = load(v, 8 * k + i)
            store(v, 8 * k + i, where(is_odd & (cheapest == ints(i)), _negated(value), value))
        signs = (signs ^ where(is_odd, ints(1) << cheapest, ints(0))) & ints(127)
    return signs


@inlined
def _cheapest_sign(x: F32Tile, w: F32Tile, first: int, k: int) -> I32Lanes:
    """Which of the 8 values of group k has the least weight * value^2; the first of several."""
    value = load(x, first + 8 * k)
    least, cheapest = load(w, 8 * k) * value * value, ints(0)
    for i in range(1, 8):
        value = load(x, first + 8 * k + i)
        cost = load(w, 8 * k + i) * value * value
        is_less = cost < least
        least = where(is_less, cost, least)
        cheapest = where(is_less, ints(i), cheapest)
    return cheapest


@inlined
def complete_signs(seven: I32Lanes) -> I32Lanes:
    """8 signs: the lowest 7 bits, and the eighth, which makes their number even (ggml's ksigns_iq2xs)."""
    signs = bit_field(seven, 0, 7)
    return signs | (_parity(signs) << ints(7))


# scales ---------------------------------------------------------------------------------------------------------


@inlined
def make_scale_positive(
    scale: F32Lanes, is_zero: Mask, signs: I32Tile, codes: I32Tile, first: int, n: int, sign_bits: int
) -> F32Lanes:
    """The scale >= 0 of the n groups from `first` on: a negative one turns their signs, all of sign_bits.

    is_zero: where the groups are zeros; there the scale is 0, and they get no signs and the point with code 0.
    """
    is_negative = scale < floats(0.0)
    for k in range(first, first + n):
        group = load(signs, k)
        group = where(is_negative, group ^ ints(sign_bits), group)
        store(signs, k, where(is_zero, ints(0), group))
        store(codes, k, where(is_zero, ints(0), load(codes, k)))
    return where(is_zero, floats(0.0), where(is_negative, _negated(scale), scale))


@inlined
def quantize_scales(scales: F32Tile, levels: I32Tile, n: int) -> F32Lanes:
    """d, 0 where all n scales are; their levels of 4 bits, which stand for d * (2 * level + 1), go to `levels`."""
    top = highest_of(scales, n)
    d = top / floats(31.0)
    inverse = floats(1.0) / d
    for j in range(n):
        level = nearest_int(floats(0.5) * (inverse * load(scales, j) - floats(1.0)))
        level = clamp(level, ints(0), ints(15))
        store(levels, j, where(top == floats(0.0), ints(0), level))
    return d


# points ---------------------------------------------------------------------------------------------------------

# place_point(z, first, scale, code, signs), as make_place_point says.
PlacePoint = Callable[[F32Tile, int, F32Lanes, I32Lanes, I32Lanes], None]


def make_place_point(grid: Grid) -> PlacePoint:
    """A part of kernels that decodes a group: place_point(z, first, scale, code, signs).

    The values of the point with that code, times the scale, go to z from vector `first` on. signs: a bit for each
    value, the first in the lowest; 1 is a minus.
    """
    n_words = grid.size // 4  # four values, a byte each, are gathered at once
    words = embedded_array(lambda: grid.values().reshape(-1).view(np.int32))

    @inlined
    def place_point(z: F32Tile, first: int, scale: F32Lanes, code: I32Lanes, signs: I32Lanes) -> None:
        table = words()
        for k in range(n_words):
            word = gather(table, code * ints(n_words) + ints(k))
            for i in range(4):
                size = scale * to_float(bit_field(word, 8 * i, 8))
                # Bit 4 k + i moves to bit 31; what was above it is pushed out.
                store(z, first + 4 * k + i, float_of_bits(bits_of(size) ^ ((signs >> ints(4 * k + i)) << ints(31))))

    return place_point
