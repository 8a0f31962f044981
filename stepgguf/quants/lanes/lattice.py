"""The fit of a scale where levels are stored in groups: every trial snaps each group to a point of the grid (grid.py).

A group whose rounded levels are no point takes the closest of the points around them, by weighted distance. Nearly all
of ggml's time goes into that search (iq2_find_best_neighbour, iq3_find_best_neighbour); closest.py, direct.py are ours.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from stepgguf.quants.lanes.closest import ROW, host_permutation, make_closest, transpose_terms
from stepgguf.quants.lanes.compile import inlined
from stepgguf.quants.lanes.grid import Grid, embedded_array, list_neighbours
from stepgguf.quants.lanes.operands import F32Lanes, F32Tile, I32Lanes, I32Tile, Mask
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
    size, sum_products = grid.size, _make_sum_products(grid, n)
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
            sum_xq, sum_q2 = sum_products(v, w, trial)
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
        sum_xq, sum_q2 = sum_products(v, w, chosen)
        return where(is_redone & (sum_q2 > floats(0.0)), sum_xq / sum_q2, scale)

    return fit


def _make_sum_products(grid: Grid, n: int) -> Callable[[F32Tile, F32Tile, I32Tile], tuple[F32Lanes, F32Lanes]]:
    """sum_products(v, w, words): sums of weight * value * q and weight * q^2 over n groups; q = 2 * level + 1."""
    size, bits, mask = grid.size, grid.bits, (2 << grid.bits) - 2

    @inlined
    def sum_products(v: F32Tile, w: F32Tile, words: I32Tile) -> tuple[F32Lanes, F32Lanes]:
        sum_xq, sum_q2 = floats(0.0), floats(0.0)
        for k in range(n):
            doubled = load(words, k) << ints(1)  # a level and the bit below it, which becomes the 1 of 2 * level + 1
            for i in range(size):
                q = to_float(((doubled >> ints(bits * i)) & ints(mask)) | ints(1))
                value, weight = load(v, k * size + i), load(w, k * size + i)
                sum_xq = sum_xq + weight * value * q
                sum_q2 = sum_q2 + weight * q * q
        return sum_xq, sum_q2

    return sum_products


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
