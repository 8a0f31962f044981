"""K types against ggml where their searches are odd."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from stepgguf.quants.lanes import k_mins, k_scales
from tests.quants.lanes.inputs import check_rows

TYPES = {**k_mins.TYPES, **k_scales.TYPES}


@pytest.mark.parametrize("name", TYPES)
def test_rows_whose_weighted_sums_overflow_become_the_bytes_of_ggml(name: str) -> None:
    rng = np.random.default_rng(0)
    rows = (rng.normal(size=(96, 256)) * 10.0 ** rng.uniform(0, 8, (96, 1))).astype(np.float32)
    importance = (rng.standard_t(1.2, 256) ** 2 * 1e20).astype(np.float32)
    check_rows(name, TYPES[name].encode, rows, None, rows, importance)


@pytest.mark.parametrize("importance", [None, np.ones(256, np.float32)])
@pytest.mark.parametrize("name", k_scales.TYPES)
def test_of_two_scales_of_one_size_the_first_gives_the_sign(name: str, importance: NDArray[np.float32] | None) -> None:
    values = np.random.default_rng(0).normal(size=(40, 16)).astype(np.float32)
    rows = np.tile(np.concatenate([values, -values], axis=1), 8)
    check_rows(name, TYPES[name].encode, rows, None, rows, importance)
