"""IQ3_XXS and IQ3_S against ggml."""

from __future__ import annotations

import numpy as np
import pytest

from stepgguf.quants.lanes.iq3 import TYPES
from tests.quants.lanes.inputs import check_valid


@pytest.mark.parametrize("name", TYPES)
def test_any_of_the_eight_sub_blocks_may_be_zeros(name: str) -> None:
    rng = np.random.default_rng(0)
    is_zero = (np.arange(256)[:, None] >> np.arange(8)) & 1 > 0
    rows = rng.normal(size=(256, 256)).astype(np.float32)
    rows[np.repeat(is_zero, 32, axis=1)] = 0.0
    check_valid(name, TYPES[name].encode, rows, rng.random(256).astype(np.float32))


@pytest.mark.parametrize("name", TYPES)
def test_a_scale_that_the_importance_makes_denormal_becomes_what_it_is_in_ggml(name: str) -> None:
    rows = np.full((1, 256), 1e-44, np.float32)
    rows[:, ::32] = 1.0
    importance = np.full(256, 1e36, np.float32)
    importance[::32] = 0.0
    check_valid(name, TYPES[name].encode, rows, importance)
