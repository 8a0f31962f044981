"""The search among neighbours for groups of few values with many levels (IQ3: 4 values, 8 levels).

lattice.py adds up a distance from a table of each place's terms. With more levels than ggml has neighbours on its lists
(8 on average), the table costs more than it saves: here 16 distances are computed straight from the neighbours' words.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types

from stepgguf.quants.lanes.closest import CHUNK, first_smallest, spread
from stepgguf.quants.lanes.compile import inlined, primitive
from stepgguf.quants.lanes.lattice import Grid, constant, neighbours
from stepgguf.quants.lanes.rounding import clamp, nearest_int
from stepgguf.quants.lanes.vector import LANES, floats, ints, load, store

_FLOATS, _INTS = ir.VectorType(ir.FloatType(), CHUNK), ir.VectorType(ir.IntType(32), CHUNK)
_SHORTS = ir.VectorType(ir.IntType(16), CHUNK)


def snapping(grid: Grid) -> Any:
    """snap(v, root, k, inverse, scale, scratch): (group k's word for the inverse scale, the closest point).

    root: square roots of the weights. scratch [1].
    """
    size, bits, highest, closest = grid.size, grid.bits, grid.highest, _closest(grid.size, grid.bits)
    whole_lists = constant(lambda: np.split(neighbours(grid)[0], 2)[1])
    lists = constant(lambda: neighbours(grid)[1])

    @inlined
    def snap(v: Any, root: Any, k: int, inverse: Any, scale: Any, scratch: Any) -> Any:
        place_of, list_of, first = whole_lists(), lists(), np.int64(k * size)
        words, found = np.empty(LANES, np.uint32), np.empty(LANES, np.int32)
        word = ints(0)
        for i in range(size):
            level = nearest_int(floats(0.5) * (inverse * load(v, first + i) - floats(1.0)))
            word = word | (clamp(level, ints(0), ints(highest)) << ints(bits * i))
        store(words, 0, word)
        store(scratch, 0, scale)
        for lane in range(LANES):
            place = place_of[words[lane]]
            chunk = place >> 8
            best = closest(v, root, first, scratch, lane, list_of, chunk)
            for more in range(1, place & 255):
                best = min(best, closest(v, root, first, scratch, lane, list_of, chunk + more))
            found[lane] = list_of[np.uint32(best)]
        return word, load(found, 0)

    return snap


def _closest(size: int, bits: int) -> Any:
    """closest(v, root, first, scales, lane, lists, chunk): as closest.first_smallest, for a chunk of the lists.

    The group is vectors first.. of v and root, in the lane.
    """

    @primitive
    def closest(typing: Any, v: Any, root: Any, first: Any, scales: Any, lane: Any, lists: Any, chunk: Any) -> Any:
        def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            values, roots, scales, words = (
                context.make_array(sig.args[i])(context, builder, args[i]).data for i in (0, 1, 3, 5)
            )
            first, lane, chunk = (context.cast(builder, args[i], sig.args[i], types.intp) for i in (2, 4, 6))
            index = builder.mul(chunk, ir.Constant(chunk.type, CHUNK))
            stored = builder.bitcast(builder.gep(words, [index]), _SHORTS.as_pointer())
            doubled = builder.shl(builder.zext(builder.load(stored, align=2), _INTS), _ints(1))
            scale = spread(builder, builder.load(builder.gep(scales, [lane])))
            place = builder.add(builder.mul(first, ir.Constant(first.type, LANES)), lane)
            total = spread(builder, ir.FloatType()(0.0))
            for i in range(size):
                at = builder.add(place, ir.Constant(place.type, i * LANES))
                value, weight = (spread(builder, builder.load(builder.gep(data, [at]))) for data in (values, roots))
                level = builder.and_(builder.lshr(doubled, _ints(bits * i)), _ints((2 << bits) - 2))
                q = builder.sitofp(builder.or_(level, _ints(1)), _FLOATS)
                difference = builder.fsub(builder.fmul(scale, q), value)
                total = builder.fadd(total, builder.fmul(builder.fmul(weight, difference), difference))
            return first_smallest(builder, total, index)

        return types.int64(v, root, first, scales, lane, lists, chunk), build

    return closest


def _ints(number: int) -> Any:
    return ir.Constant(_INTS, [number] * CHUNK)
