"""The grids of IQ2 and IQ3: levels are stored in groups, and only the points of a grid have a code.

    word    a group's levels side by side, the first in the lowest bits          x[i] ~ scale * (2 * level[i] + 1)
    point   a word on the grid; its code is what a file stores                   IQ2: 8 levels 0..2, IQ3: 4 levels 0..7

Which points are around a word depends on the grid alone (iq2xs_init_impl): those at the smallest distances, in order of
distance and code. Most are never the closest: where a nearer point differs from the word at fewer places, or less,
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

from stepgguf.quants.lanes.closest import CHUNK
from stepgguf.quants.lanes.operands import Number
from stepgguf.quants.lanes.primitive import Call, LlvmValue, Lowering, primitive

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


def embedded_array(make: Callable[[], NDArray[Number]]) -> Callable[[], NDArray[Number]]:
    """A part of kernels that gives the array that `make` makes when a kernel is compiled: a constant in its code."""

    @primitive
    def constant() -> Lowering[NDArray[Number]]:
        array: NDArray[Any] = make()
        array_type = types.Array(from_dtype(array.dtype), 1, "C", readonly=True)

        def emit(call: Call) -> LlvmValue:
            return call.context.make_constant_array(call.builder, array_type, array)

        return Lowering(array_type, emit)

    return constant
