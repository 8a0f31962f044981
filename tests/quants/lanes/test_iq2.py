"""IQ2_XXS, IQ2_XS and IQ2_S against ggml."""

from __future__ import annotations

import numpy as np
import pytest

from stepgguf.quants.lanes.iq2 import TYPES
from tests.quants.lanes.inputs import check_valid

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", TYPES)
def test_numbers_in_the_middle_between_two_levels_take_the_points_that_ggml_takes(name: str) -> None:
    rng = np.random.default_rng(3)
    n = 256
    # With the largest at 5, the others are at 2 or 4 times one of the search's scales, but for rounding.
    rows = rng.integers(1, 3, (n, 32, 16)) * 2 * 5 / (5 + 0.1 * rng.integers(-9, 10, (n, 32, 1)))
    rows[:, :, 0] = 5
    rows = (rows * rng.uniform(0.5, 2, (n, 1, 1)) * rng.choice([-1, 1], rows.shape)).reshape(n, 512).astype(np.float32)
    check_valid(name, TYPES[name].encode, rows, np.ones(512, np.float32))


@pytest.mark.parametrize("name", TYPES)
def test_blocks_whose_scales_all_become_zero_by_underflow_are_the_bytes_of_ggml(name: str) -> None:
    rows, importance = np.zeros((4, 256), np.float32), np.full(256, 1e38, np.float32)
    # The zeros outweigh the number in each sub-block so much that the best scale is below the least float32.
    rows[:, ::16] = np.random.default_rng(7).choice([-2e-8, 2e-8], (4, 16))
    importance[::16] = 1
    check_valid(name, TYPES[name].encode, rows, importance)
