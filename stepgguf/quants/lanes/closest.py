"""The closest of 16 points at once: a search among one lane's neighbours, whose vectors are neighbours, not lanes.

A distance is a sum over the places of a group, each term one of as many as there are levels. All lanes compute these
terms together (lattice.py); a neighbour only picks its own, by the bits of its word, and adds them in ggml's order:

    terms [32][LANES] -> [LANES][32]  --lane, 16 words-->  16 sums  -->  the first of the smallest
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba.core import cgutils, types

from stepgguf.quants.lanes.compile import primitive
from stepgguf.quants.lanes.tile import transposed
from stepgguf.quants.lanes.vector import LANES

CHUNK = 16  # neighbours that are compared at once
ROW = 32  # terms of a group, with room for as many levels as the bits allow: 8 * 4 or 4 * 8
_FLOAT, _INT, _SHORT, _BIT = ir.FloatType(), ir.IntType(32), ir.IntType(16), ir.IntType(1)
_INTS = ir.VectorType(_INT, CHUNK)


def _permutation() -> tuple[str, int] | None:
    """LLVM's name for the permutation of a register by the low bits of indices, and how many numbers it permutes."""
    features = llvmlite.binding.get_host_cpu_features()
    if features.get("avx512f"):
        return "llvm.x86.avx512.permvar.sf.512", 16
    return ("llvm.x86.avx2.permps", 8) if features.get("avx2") else None


_PERMUTATION = _permutation()


@primitive
def turn(typing: Any, terms: Any, turned: Any) -> Any:
    """terms [ROW][LANES] float32 to turned [LANES][ROW]."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        source, target = (context.make_array(sig.args[i])(context, builder, args[i]).data for i in (0, 1))
        vector = ir.VectorType(_FLOAT, CHUNK).as_pointer()

        def at(data: Any, place: int) -> Any:
            return builder.bitcast(builder.gep(data, [ir.Constant(ir.IntType(64), place)]), vector)

        for row in range(0, ROW, CHUNK):
            for lane in range(0, LANES, CHUNK):
                square = [builder.load(at(source, (row + i) * LANES + lane), align=4) for i in range(CHUNK)]
                for i, value in enumerate(transposed(builder, square)):
                    builder.store(value, at(target, (lane + i) * ROW + row), align=4)
        return context.get_dummy_value()

    return types.void(terms, turned), build


def closest_of(size: int, bits: int) -> Any:
    """closest(turned, lane, lists, chunk): the smallest distance's bits << 32 | index of the first word that has it."""

    @primitive
    def closest(typing: Any, turned: Any, lane: Any, lists: Any, chunk: Any) -> Any:
        def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            data, words = (context.make_array(sig.args[i])(context, builder, args[i]).data for i in (0, 2))
            lane, chunk = (context.cast(builder, args[i], sig.args[i], types.intp) for i in (1, 3))
            first = builder.mul(chunk, ir.Constant(chunk.type, CHUNK))
            stored = builder.bitcast(builder.gep(words, [first]), ir.VectorType(_SHORT, CHUNK).as_pointer())
            word = builder.zext(builder.load(stored, align=2), _INTS)
            row = builder.mul(lane, ir.Constant(lane.type, ROW))
            total = spread(builder, _FLOAT(0.0))
            for i in range(size):
                place = builder.add(row, ir.Constant(row.type, i << bits))
                column = builder.bitcast(builder.gep(data, [place]), ir.VectorType(_FLOAT, 1 << bits).as_pointer())
                level = builder.lshr(word, ir.Constant(_INTS, [bits * i] * CHUNK))
                total = builder.fadd(total, _picked(builder, builder.load(column, align=4), level, 1 << bits))
            return first_smallest(builder, total, first)

        return types.int64(turned, lane, lists, chunk), build

    return closest


def _picked(builder: Any, column: Any, level: Any, n: int) -> Any:
    """column[level % n] for CHUNK levels, by the processor's permutation of a register where it has one."""
    if _PERMUTATION is None:
        values = [spread(builder, builder.extract_element(column, _INT(q))) for q in range(n)]
        for bit in range(n.bit_length() - 1):
            is_set = builder.icmp_signed("!=", builder.and_(level, ir.Constant(_INTS, [1 << bit] * CHUNK)), _INTS(None))
            values = [builder.select(is_set, *pair) for pair in zip(values[1::2], values[::2], strict=True)]
        return values[0]
    name, width = _PERMUTATION
    numbers, indices = ir.VectorType(_FLOAT, width), ir.VectorType(_INT, width)
    permute = cgutils.get_or_insert_function(builder.module, ir.FunctionType(numbers, [numbers, indices]), name)
    table = builder.shuffle_vector(column, column, ir.Constant(indices, [i % n for i in range(width)]))
    parts = [ir.Constant(indices, [*range(first, first + width)]) for first in range(0, CHUNK, width)]
    picked = [builder.call(permute, [table, builder.shuffle_vector(level, level, part)]) for part in parts]
    return builder.shuffle_vector(picked[0], picked[-1], ir.Constant(_INTS, [*range(CHUNK)]))


def first_smallest(builder: Any, distances: Any, first: Any) -> Any:
    """The smallest distance's bits << 32 | first + place of the first that is as small."""
    ordered = builder.bitcast(distances, _INTS)  # as the numbers are: none is negative
    reduce = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(_INT, [_INTS]), f"llvm.vector.reduce.smin.v{CHUNK}i32"
    )
    smallest = builder.call(reduce, [ordered])
    is_smallest = builder.bitcast(builder.icmp_signed("==", ordered, spread(builder, smallest)), ir.IntType(CHUNK))
    index = builder.add(first, builder.zext(builder.cttz(is_smallest, _BIT(1)), first.type))
    return builder.or_(builder.shl(builder.zext(smallest, index.type), ir.Constant(index.type, 32)), index)


def spread(builder: Any, scalar: Any) -> Any:
    """The scalar in CHUNK places."""
    one = builder.insert_element(ir.Constant(ir.VectorType(scalar.type, CHUNK), ir.Undefined), scalar, _INT(0))
    return builder.shuffle_vector(one, one, ir.Constant(_INTS, [0] * CHUNK))
