"""Rows to lanes and back: lane r of a tile is row r, vector i is column i.

A tile is as many rows as there are lanes, so a block's importance is one scalar for all lanes, and whatever ggml sums
along a row is a plain sum of vectors. Stored values are widened on the way:

    float32   itself
    uint16    BF16: the upper half of a float32
    uint8     FP8 E4M3, times the scale of its row's block: the bits in float32's places, times 2^120

Squares of 16 x 16 are transposed in registers: four rounds of interleaving vectors i and i + 8.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types

from stepgguf.quants.lanes.compile import inlined, primitive
from stepgguf.quants.lanes.vector import LANES

SIDE = 16
_FLOAT, _INT, _BYTE = ir.FloatType(), ir.IntType(32), ir.IntType(8)
_NOT_FINITE = 0x7F800000


@inlined
def lane_starts(n_rows: int, row: int, row_size: int, column: int, starts: Any) -> None:
    """starts[r]: index of `column` of row row + r in flat rows of row_size; beyond the last row, of the last row."""
    for r in range(LANES):
        starts[r] = min(row + r, n_rows - 1) * row_size + column


@inlined
def read_tile(flat: Any, starts: Any, scales: Any, x: Any, n: int) -> Any:
    """n columns (a multiple of 16) of LANES rows, into x [n * LANES]. scales: [LANES] or None. True if all finite."""
    largest = np.int32(0)
    for i in range(0, n, SIDE):
        largest = max(largest, _read_square(flat, starts, scales, x, i))
    return largest < _NOT_FINITE


@inlined
def read_bytes(flat: Any, starts: Any, y: Any, n: int) -> None:
    """n bytes (at least 16) of each of LANES rows, from flat[starts[r]:] to y [n * LANES]."""
    for i in range(0, n - SIDE, SIDE):
        _read_byte_square(flat, starts, y, i)
    _read_byte_square(flat, starts, y, n - SIDE)  # the last square may overlap the one before: same bytes


@inlined
def write_tile(y: Any, out: Any, starts: Any, n: int) -> None:
    """n bytes or float32 (at least 16) for each of LANES rows, from y [n * LANES] to out[starts[r]:]."""
    for i in range(0, n - SIDE, SIDE):
        _write_square(y, i, out, starts)
    _write_square(y, n - SIDE, out, starts)


@primitive
def _read_square(typing: Any, flat: Any, starts: Any, scales: Any, x: Any, first: Any) -> Any:
    """16 columns from starts[r] + first on, of all rows, to x[first:]; returns the largest |value| as bits."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        data, rows, factors, lanes = (
            None if kind == types.none else context.make_array(kind)(context, builder, arg).data
            for kind, arg in zip(sig.args[:4], args[:4], strict=True)
        )
        column = context.cast(builder, args[4], sig.args[4], types.intp)
        whole = ir.VectorType(_INT, SIDE)
        largest = ir.Constant(whole, [0] * SIDE)
        for group in range(0, LANES, SIDE):
            square = []
            for r in range(group, group + SIDE):
                index = builder.add(_item(builder, rows, r), column)
                value = _widened(builder, builder.gep(data, [index]), sig.args[0].dtype)
                if factors is not None:
                    value = builder.fmul(value, _spread(builder, _item(builder, factors, r)))
                magnitude = builder.and_(builder.bitcast(value, whole), ir.Constant(whole, [0x7FFFFFFF] * SIDE))
                largest = builder.select(builder.icmp_signed(">", magnitude, largest), magnitude, largest)
                square.append(value)
            for c, value in enumerate(transposed(builder, square)):
                _store(builder, value, lanes, _place(builder, column, c, group), 4)
        reduce = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(_INT, [whole]), f"llvm.vector.reduce.smax.v{SIDE}i32"
        )
        return builder.call(reduce, [largest])

    return types.int32(flat, starts, scales, x, first), build


@primitive
def _read_byte_square(typing: Any, flat: Any, starts: Any, y: Any, first: Any) -> Any:
    """16 bytes from starts[r] + first on, of all rows, to y[first:]."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        data, rows, lanes = (context.make_array(sig.args[i])(context, builder, args[i]).data for i in range(3))
        begin = context.cast(builder, args[3], sig.args[3], types.intp)
        for group in range(0, LANES, SIDE):
            pointers = [builder.gep(data, [builder.add(_item(builder, rows, group + r), begin)]) for r in range(SIDE)]
            kind = ir.VectorType(_BYTE, SIDE).as_pointer()
            square = [builder.load(builder.bitcast(pointer, kind), align=1) for pointer in pointers]
            for i, value in enumerate(transposed(builder, square)):
                _store(builder, value, lanes, _place(builder, begin, i, group), 1)
        return context.get_dummy_value()

    return types.void(flat, starts, y, first), build


@primitive
def _write_square(typing: Any, y: Any, first: Any, out: Any, starts: Any) -> Any:
    """Items [first, first + 16) of all rows, to out[starts[r] + first:]."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        lanes, data, rows = (context.make_array(sig.args[i])(context, builder, args[i]).data for i in (0, 2, 3))
        begin = context.cast(builder, args[1], sig.args[1], types.intp)
        kind = ir.VectorType(_BYTE if y.dtype == types.uint8 else _FLOAT, SIDE).as_pointer()
        align = y.dtype.bitwidth // 8
        for group in range(0, LANES, SIDE):
            pointers = [builder.gep(lanes, [_place(builder, begin, i, group)]) for i in range(SIDE)]
            square = [builder.load(builder.bitcast(pointer, kind), align=align) for pointer in pointers]
            for r, value in enumerate(transposed(builder, square), group):
                _store(builder, value, data, builder.add(_item(builder, rows, r), begin), align)
        return context.get_dummy_value()

    return types.void(y, first, out, starts), build


def transposed(builder: Any, square: list[Any]) -> list[Any]:
    """16 vectors of 16 for 16 vectors of 16."""
    low = [j for i in range(SIDE // 2) for j in (i, SIDE + i)]
    masks = [ir.Constant(ir.VectorType(_INT, SIDE), [j + half for j in low]) for half in (0, SIDE // 2)]
    for _ in range(4):
        pairs = [(square[i], square[i + SIDE // 2]) for i in range(SIDE // 2)]
        square = [builder.shuffle_vector(a, b, mask) for a, b in pairs for mask in masks]
    return square


def _widened(builder: Any, pointer: Any, dtype: Any) -> Any:
    """16 stored values as float32."""
    width = dtype.bitwidth
    whole, result = ir.VectorType(_INT, SIDE), ir.VectorType(_FLOAT, SIDE)
    stored = result if width == 32 else ir.VectorType(ir.IntType(width), SIDE)
    value = builder.load(builder.bitcast(pointer, stored.as_pointer()), align=width // 8)
    if width == 32:
        return value
    value = builder.zext(value, whole)
    if width == 16:
        return builder.bitcast(builder.shl(value, ir.Constant(whole, [16] * SIDE)), result)
    sign = builder.shl(builder.and_(value, ir.Constant(whole, [0x80] * SIDE)), ir.Constant(whole, [24] * SIDE))
    rest = builder.shl(builder.and_(value, ir.Constant(whole, [0x7F] * SIDE)), ir.Constant(whole, [20] * SIDE))
    is_nan = builder.icmp_unsigned("==", rest, ir.Constant(whole, [0x7F << 20] * SIDE))
    rest = builder.select(is_nan, ir.Constant(whole, [0x7FC00000] * SIDE), rest)
    number = builder.bitcast(builder.or_(sign, rest), result)
    return builder.fmul(number, ir.Constant(result, [2.0**120] * SIDE))


def _item(builder: Any, data: Any, i: int) -> Any:
    return builder.load(builder.gep(data, [ir.Constant(ir.IntType(64), i)]))


def _place(builder: Any, begin: Any, i: int, group: int) -> Any:
    """Index of lane `group` of vector begin + i."""
    vector = builder.add(begin, ir.Constant(begin.type, i))
    return builder.add(builder.mul(vector, ir.Constant(begin.type, LANES)), ir.Constant(begin.type, group))


def _spread(builder: Any, scalar: Any) -> Any:
    kind = ir.VectorType(_FLOAT, SIDE)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, _INT(0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(_INT, SIDE), [0] * SIDE))


def _store(builder: Any, value: Any, data: Any, place: Any, align: int) -> None:
    builder.store(value, builder.bitcast(builder.gep(data, [place]), value.type.as_pointer()), align=align)
