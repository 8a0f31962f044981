"""Rows to lanes and back: lane r of a tile is row r, vector i is column i.

A tile is as many rows as there are lanes, so a block's importance is one scalar for all lanes, and whatever ggml sums
along a row is a plain sum of vectors. Stored values are widened on the way:

    float32   itself
    uint16    BF16: the upper half of a float32
    uint8     FP8 E4M3, times the scale of its row's block: the bits in float32's places, times 2^120

Squares of 16 x 16 are transposed in registers: four rounds of interleaving vectors i and i + 8.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba.core import types
from numpy.typing import NDArray

from stepgguf.quants.lanes.compile import inlined
from stepgguf.quants.lanes.operands import ByteTile, F32Tile, Number, Stored
from stepgguf.quants.lanes.primitive import (
    BYTE,
    FLOAT,
    INT,
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
from stepgguf.quants.lanes.vector import LANES

SIDE = 16  # of a square: what one 512-bit register holds of float32
_FLOATS, _INTS = vector_of(FLOAT, SIDE), vector_of(INT, SIDE)
_INFINITY = 0x7F800000  # the bits of float32's; NaN has more


@inlined
def fill_row_starts(n_rows: int, row: int, row_size: int, column: int, starts: NDArray[np.int64]) -> None:
    """starts[r]: index of `column` of row row + r in flat rows of row_size.

    Lanes beyond the last row read and write the last row: the same bytes once more, and no lane needs a test.
    """
    for r in range(LANES):
        starts[r] = min(row + r, n_rows - 1) * row_size + column


@inlined
def read_tile(flat: Stored, starts: NDArray[np.int64], scales: NDArray[np.float32] | None, x: F32Tile, n: int) -> bool:
    """Read n columns (a multiple of 16) of LANES rows, widened, into x [n]; gives whether all are finite.

    scales: [LANES], what each row's values are multiplied with, or None.
    """
    largest = np.int32(0)
    for i in range(0, n, SIDE):
        largest = max(largest, _read_square(flat, starts, scales, x, i))
    # Bits of positive floats are in the order of the numbers, so integers find the largest.
    return bool(largest < _INFINITY)


@inlined
def read_bytes(flat: NDArray[np.uint8], starts: NDArray[np.int64], y: ByteTile, n: int) -> None:
    """Read n bytes (at least 16) of each of LANES rows, from flat[starts[r]:] to y [n]."""
    for i in range(0, n - SIDE, SIDE):
        _read_byte_square(flat, starts, y, i)
    _read_byte_square(flat, starts, y, n - SIDE)  # the last square may overlap the one before: same bytes


@inlined
def write_tile(y: NDArray[Number], out: NDArray[Number], starts: NDArray[np.int64], n: int) -> None:
    """Write n bytes or float32 (at least 16) of each of LANES rows, from y [n] to out[starts[r]:]."""
    for i in range(0, n - SIDE, SIDE):
        _write_square(y, i, out, starts)
    _write_square(y, n - SIDE, out, starts)  # may overlap too


@primitive
def _read_square(
    flat: Stored, starts: NDArray[np.int64], scales: NDArray[np.float32] | None, x: F32Tile, first: int
) -> Lowering[np.int32]:
    """Read 16 columns from starts[r] + first on, of all rows, to x[first:]; gives the largest |value| as bits."""

    def emit(call: Call) -> LlvmValue:
        builder, data, rows, lanes = call.builder, call.pointer(0), call.pointer(1), call.pointer(3)
        factors = None if call.argument_types[2] == types.none else call.pointer(2)
        column = call.index(4)
        largest = repeated(_INTS, 0)
        for group in range(0, LANES, SIDE):
            square = []
            for r in range(group, group + SIDE):
                index = builder.add(_item(builder, rows, r), column)
                value = _widened(builder, builder.gep(data, [index]), call.element(0).bitwidth)
                if factors is not None:
                    value = builder.fmul(value, broadcast(builder, _item(builder, factors, r), SIDE))
                magnitude = builder.and_(builder.bitcast(value, _INTS), repeated(_INTS, 0x7FFFFFFF))
                largest = builder.select(builder.icmp_signed(">", magnitude, largest), magnitude, largest)
                square.append(value)
            for c, value in enumerate(transpose_square(builder, square)):
                _store(builder, value, lanes, _place(builder, column, c, group), 4)
        return call_llvm(builder, f"llvm.vector.reduce.smax.v{SIDE}i32", INT, largest)

    return Lowering(types.int32, emit)


@primitive
def _read_byte_square(flat: NDArray[np.uint8], starts: NDArray[np.int64], y: ByteTile, first: int) -> Lowering[None]:
    """Read 16 bytes from starts[r] + first on, of all rows, to y[first:]."""

    def emit(call: Call) -> LlvmValue:
        builder, data, rows, lanes = call.builder, call.pointer(0), call.pointer(1), call.pointer(2)
        begin = call.index(3)
        for group in range(0, LANES, SIDE):
            places = [builder.add(_item(builder, rows, group + r), begin) for r in range(SIDE)]
            square = [_load(builder, data, place, vector_of(BYTE, SIDE), 1) for place in places]
            for i, value in enumerate(transpose_square(builder, square)):
                _store(builder, value, lanes, _place(builder, begin, i, group), 1)
        return call.nothing()

    return Lowering(types.void, emit)


@primitive
def _write_square(y: NDArray[Number], first: int, out: NDArray[Number], starts: NDArray[np.int64]) -> Lowering[None]:
    """Write items first to first + 15 of all rows to out[starts[r] + first:]."""

    def emit(call: Call) -> LlvmValue:
        builder, lanes, data, rows = call.builder, call.pointer(0), call.pointer(2), call.pointer(3)
        begin, is_bytes = call.index(1), call.element(0) == types.uint8
        vector, align = (vector_of(BYTE, SIDE), 1) if is_bytes else (_FLOATS, 4)
        for group in range(0, LANES, SIDE):
            places = [_place(builder, begin, i, group) for i in range(SIDE)]
            square = [_load(builder, lanes, place, vector, align) for place in places]
            for r, value in enumerate(transpose_square(builder, square), group):
                _store(builder, value, data, builder.add(_item(builder, rows, r), begin), align)
        return call.nothing()

    return Lowering(types.void, emit)


def transpose_square(builder: ir.IRBuilder, square: list[LlvmValue]) -> list[LlvmValue]:
    """The columns of a square of 16 vectors of 16 elements, as vectors.

    Interleaving vectors i and i + 8 moves each element's 8-bit address (vector, place) by one bit to the left, in a
    ring; after four rounds vector and place have changed sides.
    """
    low = [j for i in range(SIDE // 2) for j in (i, SIDE + i)]  # a0 b0 a1 b1 ... of two vectors a and b
    masks = [ir.Constant(vector_of(INT, SIDE), [j + half for j in low]) for half in (0, SIDE // 2)]
    for _ in range(4):
        pairs = [(square[i], square[i + SIDE // 2]) for i in range(SIDE // 2)]
        square = [builder.shuffle_vector(a, b, mask) for a, b in pairs for mask in masks]
    return square


def _widened(builder: ir.IRBuilder, pointer: LlvmValue, width: int) -> LlvmValue:
    """16 stored values of `width` bits as float32."""
    stored = _FLOATS if width == 32 else vector_of(ir.IntType(width), SIDE)
    value = builder.load(builder.bitcast(pointer, stored.as_pointer()), align=width // 8)
    if width == 32:
        return value
    value = builder.zext(value, _INTS)
    if width == 16:
        return builder.bitcast(builder.shl(value, repeated(_INTS, 16)), _FLOATS)
    # E4M3 is s eeee mmm: the sign goes to bit 31, eeee mmm to 26..20, below float32's upper 4 bits of exponent. The
    # biases are 7 and 127, so the number is 2^120 too small; multiplying is exact and right for denormals too.
    sign = builder.shl(builder.and_(value, repeated(_INTS, 0x80)), repeated(_INTS, 24))
    rest = builder.shl(builder.and_(value, repeated(_INTS, 0x7F)), repeated(_INTS, 20))
    is_nan = builder.icmp_unsigned("==", rest, repeated(_INTS, 0x7F << 20))  # E4M3's only one: all bits set
    rest = builder.select(is_nan, repeated(_INTS, 0x7FC00000), rest)
    number = builder.bitcast(builder.or_(sign, rest), _FLOATS)
    return builder.fmul(number, repeated(_FLOATS, 2.0**120))


def _item(builder: ir.IRBuilder, data: LlvmValue, i: int) -> LlvmValue:
    """data[i]."""
    return builder.load(builder.gep(data, [ir.Constant(ir.IntType(64), i)]))


def _place(builder: ir.IRBuilder, begin: LlvmValue, i: int, group: int) -> LlvmValue:
    """The index of lane `group` of vector begin + i in a tile."""
    vector = builder.add(begin, ir.Constant(begin.type, i))
    return builder.add(builder.mul(vector, ir.Constant(begin.type, LANES)), ir.Constant(begin.type, group))


def _load(builder: ir.IRBuilder, data: LlvmValue, place: LlvmValue, vector: ir.VectorType, align: int) -> LlvmValue:
    """The vector whose first element is data[place]."""
    return builder.load(vector_pointer(builder, data, place, vector), align=align)


def _store(builder: ir.IRBuilder, value: LlvmValue, data: LlvmValue, place: LlvmValue, align: int) -> None:
    """Put a vector to data[place:]."""
    builder.store(value, vector_pointer(builder, data, place, value.type), align=align)
