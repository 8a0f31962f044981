"""The search among neighbours for groups of few values with many levels (IQ3: 4 values, 8 levels).

lattice.py adds up a distance from a table of each place's terms. With more levels than ggml has neighbours on its lists
(8 on average), the table costs more than it saves: here 16 distances are computed straight from the neighbours' words.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from llvmlite import ir
from numba.core import types
from numpy.typing import NDArray

from stepgguf.quants.lanes.closest import CHUNK, FLOATS, INTS, first_smallest, load_chunk
from stepgguf.quants.lanes.compile import inlined
from stepgguf.quants.lanes.grid import Grid, embedded_array, list_neighbours
from stepgguf.quants.lanes.lattice import Snap
from stepgguf.quants.lanes.operands import F32Lanes, F32Tile, I32Lanes
from stepgguf.quants.lanes.primitive import FLOAT, Call, LlvmValue, Lowering, broadcast, primitive, repeated
from stepgguf.quants.lanes.rounding import clamp, nearest_int
from stepgguf.quants.lanes.vector import LANES, floats, ints, load, store


def make_direct_snap(grid: Grid) -> Snap:
    """A search as lattice.make_snap gives it: the same results. scratch: one vector is enough."""
    size, bits, highest, closest = grid.size, grid.bits, grid.highest, _make_closest(grid.size, grid.bits)
    whole_lists = embedded_array(lambda: np.split(list_neighbours(grid)[0], 2)[1])
    lists = embedded_array(lambda: list_neighbours(grid)[1])

    @inlined
    def snap(
        v: F32Tile, root: F32Tile, k: int, inverse: F32Lanes, scale: F32Lanes, scratch: F32Tile
    ) -> tuple[I32Lanes, I32Lanes]:
        place_of, list_of, first = whole_lists(), lists(), np.int64(k * size)
        # Unsigned, so that an index needs no test for negative ones.
        words, found = np.empty(LANES, np.uint32), np.empty(LANES, np.int32)
        word = ints(0)
        for i in range(size):
            level = nearest_int(floats(0.5) * (inverse * load(v, first + i) - floats(1.0)))
            word = word | (clamp(level, ints(0), ints(highest)) << ints(bits * i))
        store(words.view(np.int32), 0, word)
        store(scratch, 0, scale)
        # From here on each lane is searched by itself: 16 neighbours of its word are what a vector holds.
        for lane in range(LANES):
            place = place_of[words[lane]]
            chunk = place >> 8
            best = closest(v, root, first, scratch, lane, list_of, chunk)
            for more in range(1, place & 255):
                best = min(best, closest(v, root, first, scratch, lane, list_of, chunk + more))
            found[lane] = list_of[np.uint32(best)]  # the index is in the lower 32 bits
        return word, load(found, 0)

    return snap


DirectClosest = Callable[[F32Tile, F32Tile, np.int64, F32Tile, int, NDArray[np.uint16], int], np.int64]


def _make_closest(size: int, bits: int) -> DirectClosest:
    """closest(v, root, first, scales, lane, lists, chunk): as closest.make_closest's, without a table of terms.

    The group is vectors first.. of v and root, in the lane; its scale is that lane of `scales`.
    """

    @primitive
    def closest(
        v: F32Tile,
        root: F32Tile,
        first: np.int64,
        scales: F32Tile,
        lane: int,
        lists: NDArray[np.uint16],
        chunk: int,
    ) -> Lowering[np.int64]:
        def emit(call: Call) -> LlvmValue:
            builder, values, roots, scales = call.builder, call.pointer(0), call.pointer(1), call.pointer(3)
            first, lane = call.index(2), call.index(4)
            words, index = load_chunk(call, 5, 6)
            # q = 2 * level + 1: with words doubled, a level and the 0 below it are masked out and get their 1.
            doubled = builder.shl(words, repeated(INTS, 1))
            scale = broadcast(builder, builder.load(builder.gep(scales, [lane])), CHUNK)
            place = builder.add(builder.mul(first, ir.Constant(first.type, LANES)), lane)
            total = broadcast(builder, FLOAT(0.0), CHUNK)
            for i in range(size):
                at = builder.add(place, ir.Constant(place.type, i * LANES))
                value, weight = (
                    broadcast(builder, builder.load(builder.gep(data, [at])), CHUNK) for data in (values, roots)
                )
                level = builder.and_(builder.lshr(doubled, repeated(INTS, bits * i)), repeated(INTS, (2 << bits) - 2))
                q = builder.sitofp(builder.or_(level, repeated(INTS, 1)), FLOATS)
                difference = builder.fsub(builder.fmul(scale, q), value)
                # ggml's order, iq3_find_best_neighbour: weight * diff * diff from the left, then added.
                total = builder.fadd(total, builder.fmul(builder.fmul(weight, difference), difference))
            return first_smallest(builder, total, index)

        return Lowering(types.int64, emit)

    return closest
