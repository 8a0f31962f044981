"""What the kernels on blocks taken apart (feedback.py, descent.py) share: a type's rules, its parts in tiles, products.

One kernel serves all types: what tells them apart is a few numbers, which it gets as Rules. The columns that a kernel
goes through are a step: at most 256, whole blocks. Tiles are of the step's columns, blocks or sub-blocks.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stepgguf.quants.lanes.compile import inlined
from stepgguf.quants.lanes.iq4 import VALUES, nearest_level
from stepgguf.quants.lanes.operands import ByteTile, F32Lanes, F32Tile, I32Lanes
from stepgguf.quants.lanes.rounding import nearest_int
from stepgguf.quants.lanes.vector import (
    LANES,
    byte_tile,
    f32_tile,
    floats,
    gather,
    ints,
    load,
    load_bytes,
    store,
    to_float,
    where,
)

GROUP = 8  # columns whose sums stay in registers together

Floats = NDArray[np.float32]


class Rules(NamedTuple):
    """How values are made of their parts: factor * scale * value of code - minimum_factor * minimum.

    block, sub              values in a block, which has factors, and in a sub-block, which has a scale and a minimum
    lowest, highest, zero   the codes that may be chosen, and the one of 0
    has_uneven_codes        codes stand for IQ4's values, not for code - zero
    has_scales              scales and minimums are whole numbers in these ranges; else they are 1
    has_minimums            values are lowered; else minimum_factor is 0
    """

    block: int
    sub: int
    lowest: int
    highest: int
    zero: int
    has_uneven_codes: bool
    has_scales: bool
    lowest_scale: int
    highest_scale: int
    has_minimums: bool
    highest_minimum: int


class PartTiles(NamedTuple):
    """The parts of a step of LANES rows."""

    factors: F32Tile
    minimum_factors: F32Tile
    scales: F32Tile
    minimums: F32Tile
    codes: ByteTile


@inlined
def part_tiles(rules: Rules, n: int) -> PartTiles:
    """Room for the parts of n columns."""
    blocks, subs = n // rules.block, n // rules.sub
    return PartTiles(f32_tile(blocks), f32_tile(blocks), f32_tile(subs), f32_tile(subs), byte_tile(n))


@inlined
def read_numbers(numbers: Floats, row: int, first: int, tile: F32Tile) -> None:
    """Fill a tile with the numbers from column `first` on of LANES rows, the last repeated where there are fewer."""
    last = len(numbers) - 1
    for r in range(LANES):
        for i in range(len(tile) // LANES):
            tile[i * LANES + r] = numbers[min(row + r, last), first + i]


@inlined
def read_parts(
    factors: Floats,
    minimum_factors: Floats,
    scales: Floats,
    minimums: Floats,
    row: int,
    first: int,
    rules: Rules,
    parts: PartTiles,
) -> None:
    """Fill tiles with the parts, but for codes, of LANES rows from column `first` on."""
    read_numbers(factors, row, first // rules.block, parts.factors)
    read_numbers(minimum_factors, row, first // rules.block, parts.minimum_factors)
    read_numbers(scales, row, first // rules.sub, parts.scales)
    read_numbers(minimums, row, first // rules.sub, parts.minimums)


@inlined
def write_numbers(tile: F32Tile, row: int, first: int, numbers: Floats) -> None:
    """The inverse of read_numbers."""
    for r in range(min(LANES, len(numbers) - row)):
        for i in range(len(tile) // LANES):
            numbers[row + r, first + i] = tile[i * LANES + r]


@inlined
def step_of(parts: PartTiles, s: int, rules: Rules) -> tuple[F32Lanes, F32Lanes]:
    """(what the values of sub-block s are multiplied with, what is subtracted then), as a decoder has them."""
    b = s * rules.sub // rules.block
    step = load(parts.factors, b) * load(parts.scales, s)
    return step, load(parts.minimum_factors, b) * load(parts.minimums, s)


@inlined
def value_at(parts: PartTiles, i: int, rules: Rules) -> F32Lanes:
    """What the code of column i stands for."""
    return value_of(load_bytes(parts.codes, i), rules)


@inlined
def value_of(code: I32Lanes, rules: Rules) -> F32Lanes:
    """What a code stands for, before it is scaled."""
    if rules.has_uneven_codes:
        return gather(VALUES, code)
    return to_float(code - ints(rules.zero))


@inlined
def nearest_code(v: F32Lanes, rules: Rules) -> I32Lanes:
    """The code whose value is nearest to v."""
    if rules.has_uneven_codes:
        return nearest_level(v)
    return nearest_int(limited(v, rules.lowest - rules.zero, rules.highest - rules.zero)) + ints(rules.zero)


@inlined
def limited(v: F32Lanes, low: int, high: int) -> F32Lanes:
    """The number, or the nearer end where it is not from low to high; low for NaN."""
    v = where(v > floats(low), v, floats(low))
    return where(v < floats(high), v, floats(high))


@inlined
def add_products(u: F32Tile, start: int, stop: int, matrix: Floats, column: int, sums: F32Tile) -> None:
    """Add the sum over k from start to stop - 1 of u[k] * matrix[k, i] to sums[i], for GROUP i from `column` on."""
    s0, s1, s2, s3 = load(sums, column), load(sums, column + 1), load(sums, column + 2), load(sums, column + 3)
    s4, s5, s6, s7 = load(sums, column + 4), load(sums, column + 5), load(sums, column + 6), load(sums, column + 7)
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
    store(sums, column, s0)
    store(sums, column + 1, s1)
    store(sums, column + 2, s2)
    store(sums, column + 3, s3)
    store(sums, column + 4, s4)
    store(sums, column + 5, s5)
    store(sums, column + 6, s6)
    store(sums, column + 7, s7)
