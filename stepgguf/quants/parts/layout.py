"""Where the numbers of a block stand, one row of TABLE for each type: enough to take blocks apart and to pack them.

    value = factor * scale * (level - zero) - minimum_factor * minimum          level: the code of a value

scale and minimum belong to a sub-block of `sub` values, factor and minimum_factor (FP16) to the block. Where a type has
no scales of its own (Q4_0 to Q8_0, IQ4_NL), block and sub-block are the same and the scale is 1. IQ4's levels stand for
uneven values instead of level - zero.

A number's bits are scattered over the block in fields: bytes side by side, each with some bits of one number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from gguf import GGMLQuantizationType

T = GGMLQuantizationType


class Field(NamedTuple):
    """Bits of numbers that stand side by side: byte offset + i has some of number first + i, for i below n.

    They are the byte's bits from `right` on, and the number's from `left` on.
    """

    offset: int
    n: int
    right: int
    bits: int
    first: int
    left: int


@dataclass(frozen=True, slots=True)
class Numbers:
    """Numbers of one kind in a block: what stands in the bytes, less `zero`, is the number.

    lowest, highest     of the stored form; what a search may choose
    signed              stored as int8: the top bit is turned over first, so that the stored form has no sign
    """

    fields: tuple[Field, ...]
    zero: int
    lowest: int
    highest: int
    signed: bool = False


@dataclass(frozen=True, slots=True)
class Layout:
    """A type's block. `factor`, `minimum_factor`: byte offsets of the FP16 numbers.

    added_minimum   the block stores what is added (Q4_1, Q5_1), not what is subtracted
    uneven          levels stand for IQ4's values
    """

    block: int
    sub: int
    codes: Numbers
    factor: int
    scales: Numbers | None = None
    minimum_factor: int | None = None
    minimums: Numbers | None = None
    added_minimum: bool = False
    uneven: bool = False


def _planes(offset: int, groups: int, width: int, bits: int, left: int = 0) -> tuple[Field, ...]:
    """Groups of `width` bytes; each byte has `bits` bits of 8 / bits numbers that stand `width` apart."""
    share = 8 // bits
    return tuple(
        Field(offset + width * group, width, bits * k, bits, width * (share * group + k), left)
        for group in range(groups)
        for k in range(share)
    )


def _levels(bits: int, zero: int, *fields: tuple[Field, ...]) -> Numbers:
    return Numbers(sum(fields, ()), zero, 0, (1 << bits) - 1)


def _every_other(first: int, fields: tuple[Field, ...]) -> tuple[Field, ...]:
    """Of numbers that stand by turns in a block, those of one kind, numbered by themselves."""
    return tuple(field._replace(first=field.first // 2) for field in fields if field.first % 2 == first)


_SIX_BIT_SCALES = Numbers((Field(4, 4, 0, 6, 0, 0), Field(12, 4, 0, 4, 4, 0), Field(4, 4, 6, 2, 4, 4)), 0, 0, 63)
_SIX_BIT_MINIMUMS = Numbers((Field(8, 4, 0, 6, 0, 0), Field(12, 4, 4, 4, 4, 0), Field(8, 4, 6, 2, 4, 4)), 0, 0, 63)
_Q2_FACTORS = _planes(0, 16, 1, 4)

# lanes/ draws each block.
TABLE = {
    T.Q2_K: Layout(
        256, 16, _levels(2, 0, _planes(16, 2, 32, 2)), 80,
        Numbers(_every_other(0, _Q2_FACTORS), 0, 0, 15), 82, Numbers(_every_other(1, _Q2_FACTORS), 0, 0, 15),
    ),
    T.Q3_K: Layout(
        256, 16, _levels(3, 4, _planes(32, 2, 32, 2), _planes(0, 1, 32, 1, 2)), 108,
        Numbers(_planes(96, 1, 8, 4) + _planes(104, 1, 4, 2, 4), 32, 0, 63),
    ),
    T.Q4_K: Layout(256, 32, _levels(4, 0, _planes(16, 4, 32, 4)), 0, _SIX_BIT_SCALES, 2, _SIX_BIT_MINIMUMS),
    T.Q5_K: Layout(
        256, 32, _levels(5, 0, _planes(48, 4, 32, 4), _planes(16, 1, 32, 1, 4)), 0,
        _SIX_BIT_SCALES, 2, _SIX_BIT_MINIMUMS,
    ),
    T.Q6_K: Layout(
        256, 16, _levels(6, 32, _planes(0, 2, 64, 4), _planes(128, 2, 32, 2, 4)), 208,
        Numbers(_planes(192, 1, 16, 8), 128, 0, 255, signed=True),
    ),
    T.IQ4_XS: Layout(
        256, 32, _levels(4, 0, _planes(8, 8, 16, 4)), 0,
        Numbers(_planes(4, 4, 1, 4) + _planes(2, 2, 1, 2, 4), 32, 0, 63), uneven=True,
    ),
    T.IQ4_NL: Layout(32, 32, _levels(4, 0, _planes(2, 1, 16, 4)), 0, uneven=True),
    T.Q4_0: Layout(32, 32, _levels(4, 8, _planes(2, 1, 16, 4)), 0),
    T.Q4_1: Layout(32, 32, _levels(4, 0, _planes(4, 1, 16, 4)), 0, minimum_factor=2, added_minimum=True),
    T.Q5_0: Layout(32, 32, _levels(5, 16, _planes(6, 1, 16, 4), _planes(2, 4, 1, 1, 4)), 0),
    T.Q5_1: Layout(
        32, 32, _levels(5, 0, _planes(8, 1, 16, 4), _planes(4, 4, 1, 1, 4)), 0, minimum_factor=2, added_minimum=True
    ),
    # -128 stands nowhere in ggml's own blocks, and some of its products take its absolute value as int8.
    T.Q8_0: Layout(32, 32, Numbers(_planes(2, 1, 32, 8), 128, 1, 255, signed=True), 0),
}  # fmt: skip
