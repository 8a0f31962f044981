"""What the blocks of IQ2 and IQ3 share: signs apart from sizes, 4 bits for each scale, and points back to numbers.

Where a file has only 7 bits for 8 signs, their product must be +1: if it is not, the value that costs least takes the
wrong sign (quantize_row_iq2_xxs_impl in ggml-quants.c).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepgguf.quants.lanes.blocks import sum_of_squares
from stepgguf.quants.lanes.compile import inlined
from stepgguf.quants.lanes.lattice import Grid, constant
from stepgguf.quants.lanes.rounding import clamp, nearest_int
from stepgguf.quants.lanes.vector import bits, floats, gather, ints, load, store, to_float, where


def numerators(middle: float, step: float, n: int) -> NDArray[np.float32]:
    """middle + step * i for i from -n to n, in float32 as C adds them."""
    grid: NDArray[np.float32] = np.float32(middle) + np.float32(step) * np.arange(-n, n + 1, dtype=np.float32)
    return grid


@inlined
def mean_square(x: Any, factor: float) -> Any:
    """ggml's sigma2: factor times the sum of the block's squares, divided by 256."""
    return floats(factor) * sum_of_squares(x, 0, 256) / floats(256.0)


@inlined
def _negated(v: Any) -> Any:
    return bits(bits(v) ^ ints(-(2**31)))


@inlined
def _parity(signs: Any) -> Any:
    """1 if an odd number of the 8 bits is set, else 0."""
    for shift in (4, 2, 1):
        signs = signs ^ (signs >> ints(shift))
    return signs & ints(1)


@inlined
def split_signs(x: Any, w: Any, v: Any, first: int, k: int, is_even: bool) -> Any:
    """Signs of group k of the values from vector `first` of x on; their sizes go to v.

    is_even: the number of signs is made even by a wrong one, where it costs least; then 7 of them are returned.
    """
    zero, signs = floats(0.0), ints(0)
    for i in range(8):
        value = load(x, first + 8 * k + i)
        is_negative = value < zero
        store(v, 8 * k + i, where(is_negative, _negated(value), value))
        signs = signs | where(is_negative, ints(1 << i), ints(0))
    if is_even:
        value = load(x, first + 8 * k)
        least, cheapest = load(w, 8 * k) * value * value, ints(0)
        for i in range(1, 8):
            value = load(x, first + 8 * k + i)
            cost = load(w, 8 * k + i) * value * value
            is_less = cost < least
            least = where(is_less, cost, least)
            cheapest = where(is_less, ints(i), cheapest)
        is_odd = _parity(signs) != ints(0)
        for i in range(8):
            value = load(v, 8 * k + i)
            store(v, 8 * k + i, where(is_odd & (cheapest == ints(i)), _negated(value), value))
        signs = (signs ^ where(is_odd, ints(1) << cheapest, ints(0))) & ints(127)
    return signs


@inlined
def largest(v: Any, n: int) -> Any:
    """Of the n values in v."""
    result = load(v, 0)
    for i in range(1, n):
        value = load(v, i)
        result = where(result > value, result, value)
    return result


@inlined
def finish(scale: Any, is_zero: Any, signs: Any, numbers: Any, first: int, n: int, mask: int) -> Any:
    """Groups of zeros get no signs and point 0, a negative scale turns the signs. Returns the scale >= 0."""
    is_negative = scale < floats(0.0)
    for k in range(first, first + n):
        group = load(signs, k)
        group = where(is_negative, group ^ ints(mask), group)
        store(signs, k, where(is_zero, ints(0), group))
        store(numbers, k, where(is_zero, ints(0), load(numbers, k)))
    return where(is_zero, floats(0.0), where(is_negative, _negated(scale), scale))


@inlined
def scale_levels(scales: Any, levels: Any, n: int) -> Any:
    """4 bits for each of n scales, to levels; returns d, 0 where all scales are."""
    top = largest(scales, n)
    d = top / floats(31.0)
    inverse = floats(1.0) / d
    for j in range(n):
        level = nearest_int(floats(0.5) * (inverse * load(scales, j) - floats(1.0)))
        level = clamp(level, ints(0), ints(15))
        store(levels, j, where(top == floats(0.0), ints(0), level))
    return d


@inlined
def eight_signs(seven: Any) -> Any:
    """The lowest 7 bits with the eighth, which makes their number even."""
    signs = seven & ints(127)
    return signs | (_parity(signs) << ints(7))


def placing(grid: Grid) -> Any:
    """place(z, first, scale, number, signs): a point's values times the scale, to z from vector `first` on.

    signs: a bit for each value, the first in the lowest; 1 is a minus.
    """
    n_words = grid.size // 4
    words = constant(lambda: grid.values().reshape(-1).view(np.int32))

    @inlined
    def place(z: Any, first: int, scale: Any, number: Any, signs: Any) -> None:
        table = words()
        for k in range(n_words):
            word = gather(table, number * ints(n_words) + ints(k))
            for i in range(4):
                size = scale * to_float((word >> ints(8 * i)) & ints(255))
                store(z, first + 4 * k + i, bits(bits(size) ^ ((signs >> ints(4 * k + i)) << ints(31))))

    return place
