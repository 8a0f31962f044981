"""The closest of 16 points at once: a search among one lane's neighbours, whose vectors are neighbours, not lanes.

A distance is a sum over the places of a group, each term one of as many as there are levels. All lanes compute these
terms together (lattice.py); a neighbour only picks its own, by the bits of its word, and adds them in ggml's order:

    terms [32][LANES] -> [LANES][32]  --lane, 16 words-->  16 sums  -->  the first of the smallest
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba.core import types
from numpy.typing import NDArray

from stepgguf.quants.lanes.operands import F32Tile
from stepgguf.quants.lanes.primitive import (
    BIT,
    FLOAT,
    INT,
    SHORT,
    Call,
    LlvmValue,
    Lowering,
    broadcast,
    call_llvm,
    primitive,
    repeated,
    vector_of,
    vector_pointer,
)
from stepgguf.quants.lanes.tile import transpose_square
from stepgguf.quants.lanes.vector import LANES

CHUNK = 16  # neighbours that are compared at once
ROW = 32  # terms of a group, with room for as many levels as the bits allow: 8 * 4 or 4 * 8
FLOATS, INTS, SHORTS = (vector_of(element, CHUNK) for element in (FLOAT, INT, SHORT))

# LLVM's name for a permutation of a register by the low bits of indices, and how many numbers it permutes.
Permutation: TypeAlias = tuple[str, int]
# closest(turned, lane, lists, chunk): see make_closest.
Closest: TypeAlias = Callable[[F32Tile, int, NDArray[np.uint16], int], np.int64]


def host_permutation() -> Permutation | None:
    """The widest permutation that this processor has in one instruction, or None."""
    features = llvmlite.binding.get_host_cpu_features()
    if features.get("avx512f"):
        return "llvm.x86.avx512.permvar.sf.512", 16
    return ("llvm.x86.avx2.permps", 8) if features.get("avx2") else None


@primitive
def transpose_terms(terms: F32Tile, turned: F32Tile) -> Lowering[None]:
    """Turn terms [ROW][LANES] float32 to turned [LANES][ROW], so that the terms of one lane are side by side."""

    def emit(call: Call) -> LlvmValue:
        builder, source, target = call.builder, call.pointer(0), call.pointer(1)

        def at(data: LlvmValue, place: int) -> LlvmValue:
            return vector_pointer(builder, data, ir.Constant(ir.IntType(64), place), FLOATS)

        for row in range(0, ROW, CHUNK):
            for lane in range(0, LANES, CHUNK):
                square = [builder.load(at(source, (row + i) * LANES + lane), align=4) for i in range(CHUNK)]
                for i, value in enumerate(transpose_square(builder, square)):
                    builder.store(value, at(target, (lane + i) * ROW + row), align=4)
        return call.nothing()

    return Lowering(types.void, emit)


def make_closest(size: int, bits: int, permutation: Permutation | None) -> Closest:
    """A part of kernels that searches a chunk of a list for groups of `size` values with `bits` bits for each level.

    closest(turned, lane, lists, chunk) gives the smallest distance's bits << 32 | the index in `lists` of the first
    word that has it: the minimum over several chunks is the first of the smallest of all.
    """

    @primitive
    def closest(turned: F32Tile, lane: int, lists: NDArray[np.uint16], chunk: int) -> Lowering[np.int64]:
        def emit(call: Call) -> LlvmValue:
            builder, data = call.builder, call.pointer(0)
            lane = call.index(1)
            words, first = load_chunk(call, 2, 3)
            row = builder.mul(lane, ir.Constant(lane.type, ROW))
            total = broadcast(builder, FLOAT(0.0), CHUNK)
            for i in range(size):
                place = builder.add(row, ir.Constant(row.type, i << bits))
                column = builder.load(vector_pointer(builder, data, place, vector_of(FLOAT, 1 << bits)), align=4)
                level = builder.lshr(words, repeated(INTS, bits * i))
                total = builder.fadd(total, _pick_terms(builder, column, level, 1 << bits, permutation))
            return first_smallest(builder, total, first)

        return Lowering(types.int64, emit)

    return closest


def load_chunk(call: Call, lists: int, chunk: int) -> tuple[LlvmValue, LlvmValue]:
    """(CHUNK words widened to 32 bits, the index of the first) of a chunk; `lists`, `chunk`: numbers of arguments."""
    builder, number = call.builder, call.index(chunk)
    first = builder.mul(number, ir.Constant(number.type, CHUNK))
    stored = builder.load(vector_pointer(builder, call.pointer(lists), first, SHORTS), align=2)
    return builder.zext(stored, INTS), first


def _pick_terms(
    builder: ir.IRBuilder, column: LlvmValue, level: LlvmValue, n: int, permutation: Permutation | None
) -> LlvmValue:
    """column[level % n] for CHUNK levels, by the processor's permutation of a register where it has one."""
    if permutation is None:
        values = [broadcast(builder, builder.extract_element(column, INT(q)), CHUNK) for q in range(n)]
        for bit in range(n.bit_length() - 1):  # a tournament: each bit of the level halves what is left
            is_set = builder.icmp_signed("!=", builder.and_(level, repeated(INTS, 1 << bit)), INTS(None))
            values = [builder.select(is_set, *pair) for pair in zip(values[1::2], values[::2], strict=True)]
        return values[0]
    name, width = permutation
    numbers, indices = vector_of(FLOAT, width), vector_of(INT, width)
    # The register holds the column again and again: of an index only the low bits count, which are the level's.
    table = builder.shuffle_vector(column, column, ir.Constant(indices, [i % n for i in range(width)]))
    parts = [ir.Constant(indices, [*range(first, first + width)]) for first in range(0, CHUNK, width)]
    picked = [call_llvm(builder, name, numbers, table, builder.shuffle_vector(level, level, part)) for part in parts]
    return builder.shuffle_vector(picked[0], picked[-1], ir.Constant(INTS, [*range(CHUNK)]))


def first_smallest(builder: ir.IRBuilder, distances: LlvmValue, first: LlvmValue) -> LlvmValue:
    """The smallest distance's bits << 32 | first + place of the first that is as small."""
    ordered = builder.bitcast(distances, INTS)  # none is negative, so bits are in the order of the numbers
    smallest = call_llvm(builder, f"llvm.vector.reduce.smin.v{CHUNK}i32", INT, ordered)
    is_smallest = builder.icmp_signed("==", ordered, broadcast(builder, smallest, CHUNK))
    place = builder.cttz(builder.bitcast(is_smallest, ir.IntType(CHUNK)), BIT(1))  # lanes are bits, the first lowest
    index = builder.add(first, builder.zext(place, first.type))
    return builder.or_(builder.shl(builder.zext(smallest, index.type), ir.Constant(index.type, 32)), index)
