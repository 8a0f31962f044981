"""What a calibration of the published model is said to take. Measured: benchmarks/real_layer_calibration.py."""

from __future__ import annotations

import json

import numpy as np
import pytest

from stepgguf.calibration.footprint import calibration_footprint, expert_threads
from stepgguf.files.byte_sizes import GIB
from stepgguf.model.hparams import HParams
from stepgguf.reference.token_rows import TokenRows
from tests.conftest import DATA


@pytest.fixture(scope="module")
def published() -> HParams:
    return HParams.from_config(json.loads((DATA / "step-3.5-flash-config.json").read_text())).without_mtp()


def rows_of(n_tokens: int) -> TokenRows:
    return TokenRows.of(np.zeros((n_tokens // 2048, 2048), np.int32))


@pytest.mark.parametrize("n_tokens", [131_072, 524_288])
def test_it_fits_a_workstation_of_128_gb(published: HParams, n_tokens: int) -> None:
    takes = calibration_footprint(published, rows_of(n_tokens), 20)
    states = n_tokens * published.hidden_size * 4
    assert 45 * states < takes.disk < 55 * states
    assert takes.memory < 64 * GIB


def test_memory_bounds_the_experts_in_work(published: HParams) -> None:
    rows = rows_of(131_072)
    few, more = (expert_threads(published, rows, 20, size * GIB) for size in (8, 16))
    assert 1 < few < more < 20
    assert calibration_footprint(published, rows, more).memory < 17 * GIB
    assert expert_threads(published, rows, 20, 0) == 1
    assert expert_threads(published, rows, 20, 512 * GIB) == 20
