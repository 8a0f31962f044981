"""Q2_K, Q4_K and Q5_K against ggml."""

from __future__ import annotations

import numpy as np
import pytest

from stepgguf.quants.lanes.k_mins import TYPES
from tests.quants.lanes.inputs import IMPORTANCES, check, check_decoder, check_rows

HALVES = {"Q2_K": (80, 82), "Q4_K": (0, 2), "Q5_K": (0, 2)}


@pytest.mark.parametrize("importance", [*IMPORTANCES, None])
@pytest.mark.parametrize("name", TYPES)
def test_float32_rows_become_the_bytes_of_ggml(name: str, importance: str | None) -> None:
    check(name, TYPES[name].encode, importance)


@pytest.mark.parametrize("storage", ["bf16", "fp8"])  # read by code that all types share
def test_stored_rows_become_the_bytes_of_ggml(storage: str) -> None:
    check("Q4_K", TYPES["Q4_K"].encode, "random", storage)


@pytest.mark.parametrize("name", TYPES)
def test_random_blocks_become_the_numbers_of_ggml(name: str) -> None:
    check_decoder(name, TYPES[name].decode, HALVES[name])


@pytest.mark.parametrize("name", TYPES)
def test_rows_whose_weighted_sums_overflow_become_the_bytes_of_ggml(name: str) -> None:
    rng = np.random.default_rng(0)
    rows = (rng.normal(size=(96, 256)) * 10.0 ** rng.uniform(0, 8, (96, 1))).astype(np.float32)
    importance = (rng.standard_t(1.2, 256) ** 2 * 1e20).astype(np.float32)
    check_rows(name, TYPES[name].encode, rows, None, rows, importance)
