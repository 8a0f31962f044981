"""Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 and MXFP4 against ggml."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from stepgguf.quants.lanes.plain import TYPES
from tests.quants.lanes.inputs import check_rows


def check_unweighted(name: str, rows: NDArray[np.float32]) -> None:
    check_rows(name, TYPES[name].encode, rows, None, rows, None)


def test_mxfp4_of_sizes_around_each_power_of_two_has_the_exponent_of_ggml() -> None:
    # log2f of a size a few steps below 2^k is k itself: at most 44 steps, where |k| is 64 or more.
    steps = np.arange(-64, 3)
    powers = np.array([2.0**k for k in range(-149, 128)], np.float32)
    words = np.maximum(powers.view(np.int32)[:, None] + steps, 0).astype(np.int32)
    rows = np.zeros((len(powers), len(steps), 32), np.float32)
    rows[:, :, 5] = words.view(np.float32)
    rows[:, :, 9] = -rows[:, :, 5] / 3
    check_unweighted("MXFP4", rows.reshape(len(powers), -1))


def test_mxfp4_of_a_number_in_the_middle_between_two_values_takes_the_level_that_ggml_takes() -> None:
    middles = np.array([0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6], np.float32)
    around = np.concatenate([np.nextafter(middles, np.float32(-1)), middles, np.nextafter(middles, np.float32(9))])
    rows = np.zeros((2, 2, 32), np.float32)
    rows[:, 0, : len(around)], rows[:, 0, 30] = around, 6
    rows[:, 1, : len(around)], rows[:, 1, 30] = around * 2.0**-126, 6 * 2.0**-126
    rows[1] = -rows[1]
    check_unweighted("MXFP4", rows.reshape(2, -1))


def test_q8_0_rounds_halves_away_from_zero() -> None:
    halves = np.arange(-15, 15, dtype=np.float32) + np.float32(0.5)
    rows = np.zeros((3, 32), np.float32)
    rows[:, 0] = 127
    for row, sign in zip(rows, (-np.inf, 0, np.inf), strict=True):
        row[1:31] = halves if sign == 0 else np.nextafter(halves, np.float32(sign))
    check_unweighted("Q8_0", rows)


@pytest.mark.parametrize("name", TYPES)
def test_rows_whose_inverse_scale_overflows_become_the_bytes_of_ggml(name: str) -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(40, 64)).astype(np.float32) * (2.0 ** -np.arange(110, 150)).astype(np.float32)[:, None]
    rows[:, 7] = 0
    check_unweighted(name, rows)
