"""Levels that are stored in groups: only the points of a grid have a code.

    word    a group's levels side by side, the first in the lowest bits          x[i] ~ scale * (2 * level[i] + 1)
    point   a word on the grid; its number is what a file stores                 IQ2: 8 levels 0..2, IQ3: 4 levels 0..7

A group whose rounded levels are no point takes the closest of the points around them, by weighted distance. Nearly all
of ggml's time goes into that search (iq2_find_best_neighbour, iq3_find_best_neighbour); closest.py, direct.py are ours.

Which points are around a word depends on the grid alone (iq2xs_init_impl): those at the smallest distances, in order of
distance and number. Most are never the closest: where a nearer point differs from the word at fewer places, or less,
each of its terms is no larger, hence nor is its sum, and it comes first. Lists without those are four times shorter;
they hold where the terms grow with the level's distance from the word's, which is tested, as rounding may disturb it.
The lists are computed when a kernel is compiled and are constants in it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from gguf.quants import IQ2_S, IQ2_XS, IQ2_XXS, IQ3_S, IQ3_XXS
from numba.core import types
from numba.np.numpy_support import from_dtype
from numpy.typing import NDArray

from stepgguf.quants.lanes.closest import CHUNK, ROW, host_permutation, make_closest, transpose_terms
from stepgguf.quants.lanes.compile import inlined
from stepgguf.quants.lanes.operands import F32Lanes, F32Tile, I32Lanes, I32Tile, Mask, Number
from stepgguf.quants.lanes.primitive import Call, LlvmValue, Lowering, primitive
from stepgguf.quants.lanes.rounding import clamp, nearest_int
from stepgguf.quants.lanes.search import improve_scale
from stepgguf.quants.lanes.vector import (
    LANES,
    f32_tile,
    floats,
    gather,
    i32_tile,
    ints,
    load,
    sqrt,
    store,
    to_float,
    where,
)

# Which groups are rounded once more for the scale that won: those that were no points, all, or all if any of them was
# none or no trial improved the scale. ggml's types differ here (is_on_grid, n_not_ongrid in their quantizers).
MOVED, ALL, ALL_IF_MOVED = range(3)


# gguf-py's class of an IQ type, which has its grid, packed until init_grid is called.
GridTable: TypeAlias = type[IQ2_XXS] | type[IQ2_XS] | type[IQ2_S] | type[IQ3_XXS] | type[IQ3_S]


@dataclass(frozen=True, slots=True)
class Grid:
    """The grid of an IQ type: its points are the groups of levels that have a code.

    table   gguf-py's class of the type, which has the points and what their levels stand for
    shells  how many different distances a word's list of neighbours covers (ggml's nwant)
    """

    table: GridTable
    shells: int

    @property
    def size(self) -> int:
        """Levels of a group."""
        return int(self.table.grid_shape[1])

    @property
    def highest(self) -> int:
        """The highest level; the lowest is 0."""
        return len(self.table.grid_map) - 1

    @property
    def bits(self) -> int:
        """Bits of a level in a word."""
        return self.highest.bit_length()

    def points(self) -> NDArray[np.int16]:
        """[points, size]: the levels of each point, by its code."""
        levels: NDArray[np.int64] = np.searchsorted(self.table.grid_map, self._numbers())
        return levels.astype(np.int16)

    def values(self) -> NDArray[np.uint8]:
        """[points, size]: what these levels stand for."""
        return self._numbers().astype(np.uint8)

    def _numbers(self) -> NDArray[np.float32]:
        self.table.init_grid()  # gguf-py unpacks its table when it is first needed
        assert self.table.grid is not None
        numbers: NDArray[np.float32] = self.table.grid.reshape(-1, self.size)
        return numbers


# the fit of a scale ---------------------------------------------------------------------------------------------

# snap(v, root, k, inverse, scale, scratch) -> (group k's word, the closest point), as make_snap says.
Snap = Callable[[F32Tile, F32Tile, int, F32Lanes, F32Lanes, F32Tile], tuple[I32Lanes, I32Lanes]]
# fit(v, w, scale, top, codes) -> scale, as make_fit says.
Fit = Callable[[F32Tile, F32Tile, F32Lanes, F32Lanes, I32Tile], F32Lanes]


def make_fit(grid: Grid, n: int, numerators: NDArray[np.float32], redo: int, snap: Snap) -> Fit:
    """The fit of a scale and of points to n groups, as a part of kernels.

    numerators  inverse scales to try, times `top`
    redo        MOVED, ALL or ALL_IF_MOVED
    snap        the search for the grid: make_snap(grid), or direct.make_direct_snap(grid)

    fit(v, w, scale, top, codes) -> scale

    v, w        [n * size] float32: values and weights
    scale       f32, for lanes that no trial improves
    codes       [n] int32, result: the code of each group's point
    """
    size, add_products = grid.size, _make_sums(grid, n)
    places = embedded_array(lambda: list_neighbours(grid)[0])

    @inlined
    def try_scales(
        v: F32Tile, w: F32Tile, root: F32Tile, scale: F32Lanes, top: F32Lanes, chosen: I32Tile, moved: I32Tile
    ) -> F32Lanes:
        """The best scale of all trials; its points go to `chosen`, what snapping changed in each word to `moved`."""
        best, one, scratch = floats(0.0), floats(1.0), f32_tile(2 * ROW)
        trial, moves = i32_tile(n), i32_tile(n)
        for step in range(len(numerators)):
            inverse = floats(numerators[step]) / top
            for k in range(n):
                word, point = snap(v, root, k, inverse, one / inverse, scratch)
                store(trial, k, point)
                store(moves, k, word ^ point)  # not 0 where the rounded levels are no point
            sum_xq, sum_q2 = add_products(v, w, trial)
            is_better, scale, best = improve_scale(sum_xq, sum_q2, scale, best)
            for k in range(n):
                store(chosen, k, where(is_better, load(trial, k), load(chosen, k)))
                store(moved, k, where(is_better, load(moves, k), load(moved, k)))
        return scale

    @inlined
    def snap_again(v: F32Tile, root: F32Tile, scale: F32Lanes, chosen: I32Tile, moved: I32Tile) -> Mask:
        """Round groups once more, for the scale that won, as `redo` says; in which lanes any was."""
        any_moved, is_redone, scratch = ints(redo == ALL), floats(0.0) > floats(0.0), f32_tile(2 * ROW)
        for k in range(n):
            any_moved = any_moved | load(moved, k)
        for k in range(n):
            redone = (scale > floats(0.0)) & ((any_moved if redo else load(moved, k)) != ints(0))
            _, point = snap(v, root, k, floats(1.0) / scale, scale, scratch)
            store(chosen, k, where(redone, point, load(chosen, k)))
            is_redone = is_redone | redone
        return is_redone

    @inlined
    def fit(v: F32Tile, w: F32Tile, scale: F32Lanes, top: F32Lanes, codes: I32Tile) -> F32Lanes:
        # Where no trial wins, all levels stay 0, which is a point; ALL_IF_MOVED (2) makes such lanes count as moved.
        chosen, moved = np.zeros(n * LANES, np.int32), np.full(n * LANES, redo, np.int32)
        root = f32_tile(n * size)
        for i in range(n * size):
            store(root, i, sqrt(load(w, i)))  # ggml's waux: distances weigh with the root
        scale = try_scales(v, w, root, scale, top, chosen, moved)
        is_redone = snap_again(v, root, scale, chosen, moved)
        place_of = places()
        for k in range(n):
            # A point's own list is the chunk with its code (list_neighbours), above the 8 bits of how many chunks.
            store(codes, k, gather(place_of, load(chosen, k)) >> ints(8))
        sum_xq, sum_q2 = add_products(v, w, chosen)
        return where(is_redone & (sum_q2 > floats(0.0)), sum_xq / sum_q2, scale)

    return fit


def _make_sums(grid: Grid, n: int) -> Callable[[F32Tile, F32Tile, I32Tile], tuple[F32Lanes, F32Lanes]]:
    """sums(v, w, words): of weight * value * q and weight * q^2, where q = 2 * level + 1, for n groups."""
    size, bits, mask = grid.size, grid.bits, (2 << grid.bits) - 2

    @inlined
    def sums(v: F32Tile, w: F32Tile, words: I32Tile) -> tuple[F32Lanes, F32Lanes]:
        sum_xq, sum_q2 = floats(0.0), floats(0.0)
        for k in range(n):
            doubled = load(words, k) << ints(1)  # a level and the bit below it, which becomes the 1 of 2 * level + 1
            for i in range(size):
                q = to_float(((doubled >> ints(bits * i)) & ints(mask)) | ints(1))
                value, weight = load(v, k * size + i), load(w, k * size + i)
                sum_xq = sum_xq + weight * value * q
                sum_q2 = sum_q2 + weight * q * q
        return sum_xq, sum_q2

    return sums


def make_snap(grid: Grid) -> Snap:
    """The search for a grid, as a part of kernels: snap(v, root, k, inverse, scale, scratch).

    It gives, for group k of the values v, its word for the inverse scale and the closest point, as a word.
    root: square roots of the weights. scratch: [2 * ROW].
    """
    compute_terms, closest = _make_terms(grid), make_closest(grid.size, grid.bits, host_permutation())
    places, lists = embedded_array(lambda: list_neighbours(grid)[0]), embedded_array(lambda: list_neighbours(grid)[1])

    @inlined
    def snap(
        v: F32Tile, root: F32Tile, k: int, inverse: F32Lanes, scale: F32Lanes, scratch: F32Tile
    ) -> tuple[I32Lanes, I32Lanes]:
        place_of, list_of, turned = places(), lists(), scratch[ROW * LANES :]
        words, found = i32_tile(1), i32_tile(1)
        word, is_growing = compute_terms(v, root, k, inverse, scale, scratch)
        # Where rounding has disturbed the order of the terms, the second half of the places: ggml's whole lists.
        store(words, 0, where(is_growing, word, word + ints(len(place_of) // 2)))
        transpose_terms(scratch, turned)
        # From here on each lane is searched by itself: 16 neighbours of its word are what a vector holds.
        for lane in range(LANES):
            place = place_of[words[lane]]
            best = np.int64(0x7FFFFFFFFFFFFFFF)
            for chunk in range(place >> 8, (place >> 8) + (place & 255)):
                best = min(best, closest(turned, lane, list_of, chunk))
            found[lane] = list_of[best & 0xFFFFFFFF]
        return word, load(found, 0)

    return snap


Terms = Callable[[F32Tile, F32Tile, int, F32Lanes, F32Lanes, F32Tile], tuple[I32Lanes, Mask]]


def _make_terms(grid: Grid) -> Terms:
    """compute_terms(v, root, k, inverse, scale, terms): group k's word, and whether its terms are in order.

    A term is what one value adds to a distance if it takes a level; all of them go to terms [size << bits]. They are
    in order if they grow with the level's distance from the word's.
    """
    size, bits, highest = grid.size, grid.bits, grid.highest

    @inlined
    def compute_terms(
        v: F32Tile, root: F32Tile, k: int, inverse: F32Lanes, scale: F32Lanes, terms: F32Tile
    ) -> tuple[I32Lanes, Mask]:
        word, is_growing = ints(0), ints(0) == ints(0)
        for i in range(size):
            value, weight = load(v, k * size + i), load(root, k * size + i)
            level = nearest_int(floats(0.5) * (inverse * value - floats(1.0)))
            level = clamp(level, ints(0), ints(highest))
            word = word | (level << ints(bits * i))
            last = floats(0.0)
            for q in range(highest + 1):
                difference = scale * floats(2 * q + 1) - value
                term = weight * difference * difference
                store(terms, (i << bits) + q, term)
                if q > 0:
                    is_growing = is_growing & where(level < ints(q), last <= term, term <= last)
                last = term
        return word, is_growing

    return compute_terms


# the lists ------------------------------------------------------------------------------------------------------


def embedded_array(make: Callable[[], NDArray[Number]]) -> Callable[[], NDArray[Number]]:
    """A part of kernels that gives the array that `make` makes when a kernel is compiled: a constant in its code."""

    @primitive
    def constant() -> Lowering[NDArray[Number]]:
        array: NDArray[Any] = make()
        kind = types.Array(from_dtype(array.dtype), 1, "C", readonly=True)

        def emit(call: Call) -> LlvmValue:
            return call.context.make_constant_array(call.builder, kind, array)

        return Lowering(kind, emit)

    return constant


@functools.cache
def list_neighbours(grid: Grid) -> tuple[NDArray[np.int32], NDArray[np.uint16]]:
    """(places [2 * words], lists [chunks * CHUNK]): what to search for each word, as words.

    places      first chunk << 8 | chunks: of the lists without what is never the closest, then of ggml's lists
    lists       first a chunk for each point, its own only neighbour. A list that does not fill its last chunk goes on
                with its first neighbour, which never wins against itself.
    """
    points, size, highest = grid.points(), grid.size, grid.highest
    shifts = np.int32(1) << (grid.bits * np.arange(size, dtype=np.int32))
    words = points @ shifts
    places = np.zeros((2, highest * int(shifts.sum()) + 1), np.int32)
    places[:, words] = np.arange(len(words)) << 8 | 1  # the chunk of a point has the number of its code
    lists = [np.full(CHUNK, word) for word in words]
    for cell in np.indices((highest + 1,) * size, np.int16).reshape(size, -1).T:
        distances = ((points - cell) ** 2).sum(1, dtype=np.int16)
        nearest = np.unique(distances)[: grid.shells]
        if nearest[0] > 0:
            order = np.concatenate([np.nonzero(distances == distance)[0] for distance in nearest])
            # A rival beats a neighbour if at each place it lies between the word and that, or on one of them.
            rivals = points[distances == nearest[0]]
            between = ((rivals - cell) * (rivals - points[order][:, None]) <= 0).all(2)
            is_beaten = (distances[order] > nearest[0]) & between.any(1)
            for row, listed in enumerate((order[~is_beaten], order)):
                n = -(-len(listed) // CHUNK)
                padded = np.append(listed, np.full(n * CHUNK - len(listed), listed[0]))
                places[row, cell @ shifts] = len(lists) << 8 | n
                lists += [*words[padded].reshape(n, CHUNK)]
    return places.reshape(-1), np.concatenate(lists).astype(np.uint16)
