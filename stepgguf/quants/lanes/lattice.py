"""Levels that are stored in groups: only the points of a grid have a code.

    word    a group's levels side by side, the first in the lowest bits          x[i] ~ scale * (2 * level[i] + 1)
    point   a word on the grid; its number is what a file stores                 IQ2: 8 levels 0..2, IQ3: 4 levels 0..7

A group whose rounded levels are no point takes the closest of the points around them, by weighted distance. Nearly all
of ggml's time goes into that search (iq2_find_best_neighbour, iq3_find_best_neighbour); closest.py is ours.

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
from typing import Any

import numpy as np
from numba.core import types
from numba.np.numpy_support import from_dtype
from numpy.typing import NDArray

from stepgguf.quants.lanes.closest import CHUNK, ROW, closest_of, turn
from stepgguf.quants.lanes.compile import inlined, primitive
from stepgguf.quants.lanes.rounding import clamp, nearest_int
from stepgguf.quants.lanes.vector import LANES, floats, gather, ints, load, sqrt, store, to_float, where

MOVED, ALL, ALL_IF_MOVED = range(3)  # what `lattice` rounds once more


@dataclass(frozen=True, slots=True)
class Grid:
    """kind: gguf-py's class of the type. shells: how many different distances a word's list covers (ggml's nwant)."""

    kind: Any
    shells: int

    @property
    def size(self) -> int:
        """Levels of a group."""
        return int(self.kind.grid_shape[1])

    @property
    def highest(self) -> int:
        return len(self.kind.grid_map) - 1

    @property
    def bits(self) -> int:
        return self.highest.bit_length()

    def points(self) -> NDArray[np.int16]:
        """[points, size]: their levels, by number."""
        self.kind.init_grid()
        levels: NDArray[np.int64] = np.searchsorted(self.kind.grid_map, self.kind.grid.reshape(-1, self.size))
        return levels.astype(np.int16)

    def values(self) -> NDArray[np.uint8]:
        """[points, size]: what they stand for."""
        self.kind.init_grid()
        values: NDArray[np.uint8] = self.kind.grid.reshape(-1, self.size).astype(np.uint8)
        return values


# the fit of a scale ---------------------------------------------------------------------------------------------


def lattice(
    grid: Grid, n: int, numerators: NDArray[np.float32], redo: int, snapping: Callable[[Grid], Any] | None = None
) -> Any:
    """The fit of a scale and of points to n groups, as a part of kernels.

    numerators  inverse scales to try, times `top`
    redo        what is rounded once more for the scale that won: the groups that were no points (MOVED), all groups if
                one of them was none or no trial improved the scale (ALL_IF_MOVED), or ALL
    snapping    makes the search for a grid if `_snap` does not: another with the same arguments and result

    fit(v, w, scale, top, numbers) -> scale

    v, w        [n * size] float32: values and weights
    scale       f32, for lanes that no trial improves
    numbers     [n] int32, result: the point of each group
    """
    size, snap, sums = grid.size, (snapping or _snap)(grid), _sums(grid, n)
    places = constant(lambda: neighbours(grid)[0])

    @inlined
    def fit(v: Any, w: Any, scale: Any, top: Any, numbers: Any) -> Any:
        zero, one, best = floats(0.0), floats(1.0), floats(0.0)
        root, scratch = np.empty(n * size * LANES, np.float32), np.empty(2 * ROW * LANES, np.float32)
        trial, chosen = np.empty(n * LANES, np.int32), np.zeros(n * LANES, np.int32)
        moves, moved = np.empty(n * LANES, np.int32), np.full(n * LANES, redo, np.int32)
        for i in range(n * size):
            store(root, i, sqrt(load(w, i)))
        for step in range(len(numerators)):
            inverse = floats(numerators[step]) / top
            for k in range(n):
                word, point = snap(v, root, k, inverse, one / inverse, scratch)
                store(trial, k, point)
                store(moves, k, word ^ point)
            sum_xq, sum_q2 = sums(v, w, trial)
            is_better = (sum_q2 > zero) & (sum_xq * sum_xq > best * sum_q2)
            scale = where(is_better, sum_xq / sum_q2, scale)
            best = where(is_better, scale * sum_xq, best)
            for k in range(n):
                store(chosen, k, where(is_better, load(trial, k), load(chosen, k)))
                store(moved, k, where(is_better, load(moves, k), load(moved, k)))
        any_moved, is_redone = ints(redo == ALL), zero > zero
        for k in range(n):
            any_moved = any_moved | load(moved, k)
        for k in range(n):
            redone = (scale > zero) & ((any_moved if redo else load(moved, k)) != ints(0))
            _, point = snap(v, root, k, one / scale, scale, scratch)
            store(chosen, k, where(redone, point, load(chosen, k)))
            is_redone = is_redone | redone
        place_of = places()
        for k in range(n):
            store(numbers, k, gather(place_of, load(chosen, k)) >> ints(8))
        sum_xq, sum_q2 = sums(v, w, chosen)
        return where(is_redone & (sum_q2 > zero), sum_xq / sum_q2, scale)

    return fit


def _sums(grid: Grid, n: int) -> Any:
    """sums(v, w, words): of weight * value * q and weight * q^2, where q = 2 * level + 1, for n groups."""
    size, bits, mask = grid.size, grid.bits, (2 << grid.bits) - 2

    @inlined
    def sums(v: Any, w: Any, words: Any) -> Any:
        sum_xq, sum_q2 = floats(0.0), floats(0.0)
        for k in range(n):
            doubled = load(words, k) << ints(1)
            for i in range(size):
                q = to_float(((doubled >> ints(bits * i)) & ints(mask)) | ints(1))
                value, weight = load(v, k * size + i), load(w, k * size + i)
                sum_xq = sum_xq + weight * value * q
                sum_q2 = sum_q2 + weight * q * q
        return sum_xq, sum_q2

    return sums


def _snap(grid: Grid) -> Any:
    """snap(v, root, k, inverse, scale, scratch): (group k's word for the inverse scale, the closest point).

    root: square roots of the weights. scratch [2 * 32].
    """
    size, bits, highest, closest = grid.size, grid.bits, grid.highest, closest_of(grid.size, grid.bits)
    places, lists = constant(lambda: neighbours(grid)[0]), constant(lambda: neighbours(grid)[1])

    @inlined
    def rounded(v: Any, root: Any, k: int, inverse: Any, scale: Any, terms: Any) -> Any:
        """(word, whether the terms grow with the level's distance from the word's); the terms for the scale."""
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

    @inlined
    def snap(v: Any, root: Any, k: int, inverse: Any, scale: Any, scratch: Any) -> Any:
        place_of, list_of, turned = places(), lists(), scratch[ROW * LANES :]
        words, found = np.empty(LANES, np.int32), np.empty(LANES, np.int32)
        word, is_growing = rounded(v, root, k, inverse, scale, scratch)
        store(words, 0, where(is_growing, word, word + ints(len(place_of) // 2)))
        turn(scratch, turned)
        for lane in range(LANES):
            place = place_of[words[lane]]
            best = np.int64(0x7FFFFFFFFFFFFFFF)
            for chunk in range(place >> 8, (place >> 8) + (place & 255)):
                best = min(best, closest(turned, lane, list_of, chunk))
            found[lane] = list_of[best & 0xFFFFFFFF]
        return word, load(found, 0)

    return snap


# the lists ------------------------------------------------------------------------------------------------------


def constant(make: Callable[[], NDArray[Any]]) -> Any:
    """A part of kernels that gives an array, which is computed when a kernel is compiled."""

    @primitive
    def constant(typing: Any) -> Any:
        array = make()
        kind = types.Array(from_dtype(array.dtype), 1, "C", readonly=True)
        return kind(), lambda context, builder, sig, args: context.make_constant_array(builder, kind, array)

    return constant


@functools.cache
def neighbours(grid: Grid) -> tuple[NDArray[np.int32], NDArray[np.uint16]]:
    """(places [2 * words], lists [chunks * CHUNK]): what to search for each word, as words.

    places      first chunk << 8 | chunks: of the lists without what is never the closest, then of ggml's lists
    lists       first a chunk for each point, its own only neighbour. A list that does not fill its last chunk goes on
                with its first neighbour, which never wins against itself.
    """
    points, size, highest = grid.points(), grid.size, grid.highest
    shifts = np.int32(1) << (grid.bits * np.arange(size, dtype=np.int32))
    words = points @ shifts
    places = np.zeros((2, highest * int(shifts.sum()) + 1), np.int32)
    places[:, words] = np.arange(len(words)) << 8 | 1
    lists = [np.full(CHUNK, word) for word in words]
    for cell in np.indices((highest + 1,) * size, np.int16).reshape(size, -1).T:
        distances = ((points - cell) ** 2).sum(1, dtype=np.int16)
        nearest = np.unique(distances)[: grid.shells]
        if nearest[0] > 0:
            order = np.concatenate([np.nonzero(distances == distance)[0] for distance in nearest])
            rivals = points[distances == nearest[0]]
            between = ((rivals - cell) * (rivals - points[order][:, None]) <= 0).all(2)
            is_beaten = (distances[order] > nearest[0]) & between.any(1)
            for row, listed in enumerate((order[~is_beaten], order)):
                n = -(-len(listed) // CHUNK)
                padded = np.append(listed, np.full(n * CHUNK - len(listed), listed[0]))
                places[row, cell @ shifts] = len(lists) << 8 | n
                lists += [*words[padded].reshape(n, CHUNK)]
    return places.reshape(-1), np.concatenate(lists).astype(np.uint16)
