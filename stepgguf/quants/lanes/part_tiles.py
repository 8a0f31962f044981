"""What the kernels on blocks taken apart (feedback.py, descent.py) share: levels, and products in a tile.

A tile is LANES rows. One kernel serves all types: what tells them apart is few numbers, which it gets as Rules.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stepgguf.quants.lanes.compile import inlined
from stepgguf.quants.lanes.iq4 import VALUES, nearest_level
from stepgguf.quants.lanes.operands import F32Lanes, F32Tile, I32Lanes
from stepgguf.quants.lanes.rounding import nearest_int
from stepgguf.quants.lanes.vector import LANES, floats, gather, ints, load, store, to_float, where

GROUP = 8  # columns whose sums are kept in registers together


class Rules(NamedTuple):
    """How a type's values are made of their parts (quants/parts), as plain numbers.

    block, sub      values in a block, in a sub-block
    lowest, highest codes that may be chosen; `zero`: the code of 0
    uneven          codes stand for IQ4's values
    own_scales      sub-blocks have a scale, from scale_low to scale_high; else only blocks have a factor
    minimums        0: none, 1: a factor of the block's own, 2: also one of each sub-block, up to minimum_high
    """

    block: int
    sub: int
    lowest: int
    highest: int
    zero: int
    uneven: bool
    own_scales: bool
    scale_low: int
    scale_high: int
    minimums: int
    minimum_high: int


@inlined
def nearest_code(v: F32Lanes, rules: Rules) -> I32Lanes:
    """The code whose value is nearest to v."""
    if rules.uneven:
        return nearest_level(v)
    low, high = floats(rules.lowest - rules.zero), floats(rules.highest - rules.zero)
    v = where(v > low, v, low)  # NaN becomes low
    v = where(v < high, v, high)
    return nearest_int(v) + ints(rules.zero)


@inlined
def value_of(code: I32Lanes, rules: Rules) -> F32Lanes:
    """What a code stands for, before it is scaled."""
    if rules.uneven:
        return gather(VALUES, code)
    return to_float(code - ints(rules.zero))


@inlined
def add_products(
    u: F32Tile, start: int, stop: int, matrix: NDArray[np.float32], column: int, sums: F32Tile, place: int
) -> None:
    """Add the sum over k from start to stop - 1 of u[k] * matrix[k, column + i] to sums[place + i], for GROUP i."""
    s0, s1, s2, s3 = load(sums, place), load(sums, place + 1), load(sums, place + 2), load(sums, place + 3)
    s4, s5, s6, s7 = load(sums, place + 4), load(sums, place + 5), load(sums, place + 6), load(sums, place + 7)
    for k in range(start, stop):
        v = load(u, k)
        s0 = s0 + v * floats(matrix[k, column])
        s1 = s1 + v * floats(matrix[k, column + 1])
        s2 = s2 + v * floats(matrix[k, column + 2])
        s3 = s3 + v * floats(matrix[k, column + 3])
        s4 = s4 + v * floats(matrix[k, column + 4])
        s5 = s5 + v * floats(matrix[k, column + 5])
        s6 = s6 + v * floats(matrix[k, column + 6])
        s7 = s7 + v * floats(matrix[k, column + 7])
    store(sums, place, s0)
    store(sums, place + 1, s1)
    store(sums, place + 2, s2)
    store(sums, place + 3, s3)
    store(sums, place + 4, s4)
    store(sums, place + 5, s5)
    store(sums, place + 6, s6)
    store(sums, place + 7, s7)


@inlined
def read_numbers(numbers: NDArray[np.float32], row: int, first: int, n: int, tile: F32Tile) -> None:
    """Read n numbers from column `first` on of LANES rows, the last repeated where there are fewer, to tile [n]."""
    last = len(numbers) - 1
    for r in range(LANES):
        for i in range(n):
            tile[i * LANES + r] = numbers[min(row + r, last), first + i]


@inlined
def write_numbers(tile: F32Tile, row: int, first: int, n: int, numbers: NDArray[np.float32]) -> None:
    """The inverse of read_numbers."""
    for r in range(min(LANES, len(numbers) - row)):
        for i in range(n):
            numbers[row + r, first + i] = tile[i * LANES + r]
