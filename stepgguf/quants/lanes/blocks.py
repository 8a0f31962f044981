"""What the blocks of several families share: fields in their bytes, ggml's weights of their values.

y is a block's bytes, of all lanes; `i` counts bytes in it. x is a block's values; `first` is a vector of them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from stepgguf.quants.lanes.compile import inlined
from stepgguf.quants.lanes.operands import ByteTile, F32Lanes, F32Tile, I32Lanes, Importance
from stepgguf.quants.lanes.rounding import from_half, to_half
from stepgguf.quants.lanes.vector import (
    absolute,
    floats,
    ints,
    load,
    load_bytes,
    sqrt,
    store,
    store_bytes,
    where,
)

# fields ---------------------------------------------------------------------------------------------------------


@inlined
def bit_field(word: I32Lanes, first: int, n: int) -> I32Lanes:
    """The n bits of a word from bit `first` on, as a number."""
    return (word >> ints(first)) & ints((1 << n) - 1)


@inlined
def nibbles(low: I32Lanes, high: I32Lanes) -> I32Lanes:
    """A byte of the lower 4 bits of `low` and, above them, of `high`; `store_bytes` drops what `high` has beyond."""
    return (low & ints(15)) | (high << ints(4))


@inlined
def store_short(y: ByteTile, i: int, word: I32Lanes) -> None:
    """Put the low 16 bits of an i32 to bytes i and i + 1, little-endian."""
    store_bytes(y, i, word)
    store_bytes(y, i + 1, word >> ints(8))


@inlined
def load_short(y: ByteTile, i: int) -> I32Lanes:
    """The 16 bits in bytes i and i + 1."""
    return load_bytes(y, i) | (load_bytes(y, i + 1) << ints(8))


@inlined
def store_word(y: ByteTile, i: int, word: I32Lanes) -> None:
    """Put 32 bits to bytes i to i + 3, little-endian."""
    for k in range(4):
        store_bytes(y, i + k, word >> ints(8 * k))


@inlined
def load_word(y: ByteTile, i: int) -> I32Lanes:
    """The 32 bits in bytes i to i + 3."""
    return load_short(y, i) | (load_short(y, i + 2) << ints(16))


@inlined
def store_half(y: ByteTile, i: int, v: F32Lanes) -> None:
    """Round a number to FP16 and put it to bytes i and i + 1."""
    store_short(y, i, to_half(v))


@inlined
def load_half(y: ByteTile, i: int) -> F32Lanes:
    """The number that bytes i and i + 1 hold in FP16."""
    return from_half(load_short(y, i))


# values ---------------------------------------------------------------------------------------------------------


@inlined
def signed_extreme(x: F32Tile, first: int, n: int) -> F32Lanes:
    """The value of the largest size, with its sign, of n values; the first of several, 0 where none is larger than 0.

    Every scale of a type with levels on both sides of 0 begins here: this value gets the lowest level, which is one
    step further out than the highest.
    """
    result = floats(0.0)
    for i in range(first, first + n):
        v = load(x, i)
        result = where(absolute(v) > absolute(result), v, result)
    return result


@inlined
def lowest_and_highest(x: F32Tile, first: int, n: int) -> tuple[F32Lanes, F32Lanes]:
    """The lowest and the highest of n values."""
    low, high = load(x, first), load(x, first)
    for i in range(first + 1, first + n):
        v = load(x, i)
        low = where(v < low, v, low)
        high = where(v > high, v, high)
    return low, high


@inlined
def highest_of(v: F32Tile, n: int) -> F32Lanes:
    """The highest of the n values in v (ggml's MAX: of a NaN and a number, what comes later)."""
    result = load(v, 0)
    for i in range(1, n):
        value = load(v, i)
        result = where(result > value, result, value)
    return result


@inlined
def inverse_or_zero(v: F32Lanes) -> F32Lanes:
    """1 / v, or 0 for 0."""
    return where(v == floats(0.0), floats(0.0), floats(1.0) / v)


@inlined
def sum_of_squares(x: F32Tile, first: int, n: int) -> F32Lanes:
    """The squares of n values, added in order."""
    total = floats(0.0)
    for i in range(first, first + n):
        v = load(x, i)
        total = total + v * v
    return total


@inlined
def mean_square_of_block(x: F32Tile, factor: float) -> F32Lanes:
    """ggml's sigma2: the squares of 256 values added in order, times the factor, divided by 256."""
    return floats(factor) * sum_of_squares(x, 0, 256) / floats(256.0)


@inlined
def store_weights(
    x: F32Tile, importance: NDArray[np.float32], w: F32Tile, first: int, n: int, sigma2: F32Lanes
) -> F32Lanes:
    """Put the weights importance * sqrt(sigma2 + x^2) of n values to w; gives their sum.

    sigma2 is ggml's mean square of the block or the row: the larger a value, the more its error counts.
    """
    total = floats(0.0)
    for i in range(n):
        v = load(x, first + i)
        weight = floats(importance[first + i]) * sqrt(sigma2 + v * v)
        store(w, i, weight)
        total = total + weight
    return total


@inlined
def store_weights_or_squares(
    x: F32Tile, importance: Importance, w: F32Tile, first: int, n: int, sigma2: F32Lanes
) -> None:
    """Put the weights of n values to w: as store_weights with importance, else their squares."""
    if importance is None:
        for i in range(n):
            v = load(x, first + i)
            store(w, i, v * v)
    else:
        store_weights(x, importance, w, first, n, sigma2)
