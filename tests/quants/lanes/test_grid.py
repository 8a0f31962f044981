"""The lists of neighbours against ggml's rule, spelled out (iq2xs_init_impl, iq3xs_init_impl)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gguf.quants import IQ2_S, IQ2_XS, IQ2_XXS, IQ3_S, IQ3_XXS

from stepgguf.quants.lanes.closest import CHUNK
from stepgguf.quants.lanes.grid import Grid, list_neighbours

pytestmark = pytest.mark.slow

GRIDS = [Grid(IQ2_XXS, 2), Grid(IQ2_XS, 2), Grid(IQ2_S, 1), Grid(IQ3_XXS, 2), Grid(IQ3_S, 3)]
N_WORDS = 300


def type_name(grid: Grid) -> str:
    return str(grid.table.__name__)


def sample_levels(grid: Grid) -> Any:
    """Levels [N_WORDS, size] of some words."""
    return np.random.default_rng(4).integers(0, grid.highest + 1, (N_WORDS, grid.size))


def word_of(grid: Grid, levels: Any) -> Any:
    return levels.astype(int) @ (1 << grid.bits * np.arange(grid.size))


def neighbour_lists(grid: Grid, word: int) -> tuple[Any, Any]:
    """The word's list without what is never the closest, and the whole, both with what fills their last chunks."""
    places, lists = list_neighbours(grid)
    return tuple(
        lists[(place >> 8) * CHUNK : ((place >> 8) + (place & 255)) * CHUNK].astype(int)
        for place in places.reshape(2, -1)[:, word]
    )


def ggml_neighbours(grid: Grid, levels: Any) -> list[int]:
    points = grid.points().astype(int)
    order = sorted((int(((point - levels) ** 2).sum()), number) for number, point in enumerate(points))
    distances = sorted({distance for distance, _ in order})[: grid.shells if order[0][0] else 1]
    return [int(word_of(grid, points[number])) for distance, number in order if distance in distances]


@pytest.mark.parametrize("grid", GRIDS, ids=type_name)
def test_a_word_has_the_neighbours_of_ggml_in_its_order(grid: Grid) -> None:
    for levels in sample_levels(grid):
        _, whole = neighbour_lists(grid, word_of(grid, levels))
        expected = ggml_neighbours(grid, levels)
        assert whole[: len(expected)].tolist() == expected
        assert set(whole[len(expected) :]) <= {expected[0]}
        assert len(whole) < len(expected) + CHUNK


@pytest.mark.parametrize("grid", GRIDS, ids=type_name)
def test_the_place_of_a_point_holds_its_number(grid: Grid) -> None:
    places, _ = list_neighbours(grid)
    words = word_of(grid, grid.points())
    np.testing.assert_array_equal(places.reshape(2, -1)[:, words] >> 8, np.tile(np.arange(len(words)), (2, 1)))


@pytest.mark.parametrize("grid", GRIDS, ids=type_name)
def test_the_closest_is_on_the_shorter_list_where_terms_grow_with_the_distance_from_the_word(grid: Grid) -> None:
    rng = np.random.default_rng(5)
    n_shorter = 0
    for levels in sample_levels(grid):
        # Few different terms, for ties between points and between levels.
        steps = rng.integers(0, 3, (grid.size, grid.highest + 1)).cumsum(1)
        terms = np.take_along_axis(steps, abs(np.arange(grid.highest + 1) - levels[:, None]), 1)
        shorter, whole = neighbour_lists(grid, word_of(grid, levels))
        assert closest_word(grid, shorter, terms) == closest_word(grid, whole, terms)
        n_shorter += len(shorter) < len(whole)
    assert (n_shorter > 0) == (grid.shells > 1)


def closest_word(grid: Grid, words: Any, terms: Any) -> int:
    levels = (words[:, None] >> grid.bits * np.arange(grid.size)) & ((1 << grid.bits) - 1)
    return int(words[terms[np.arange(grid.size), levels].sum(1).argmin()])
