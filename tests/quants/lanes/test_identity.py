"""Every type against ggml: its bytes from rows however they are stored, its numbers from random blocks."""

from __future__ import annotations

import pytest
from gguf import GGMLQuantizationType

from stepgguf.quants import lanes
from stepgguf.quants.lanes.lane_kernels import LaneKernels
from stepgguf.quants.types import BY_NAME
from tests.quants.lanes.inputs import IMPORTANCES, check_decoder, check_encoder

pytestmark = pytest.mark.slow

# Where distances to a grid's points overflow, ggml aborts the process.
TOO_LARGE = ("huge", "one huge")
CASES = [
    (name, importance)
    for name in lanes.NAMES
    for importance in (*IMPORTANCES, None)
    if importance is not None or not BY_NAME[name].aborts
]


def kernels_of(name: str) -> LaneKernels:
    found = lanes.kernels_of(GGMLQuantizationType[name])
    assert found is not None
    return found


def too_large_for(name: str) -> tuple[str, ...]:
    return TOO_LARGE if BY_NAME[name].grid else ()


@pytest.mark.parametrize(("name", "importance"), CASES)
def test_float32_rows_become_the_bytes_of_ggml(name: str, importance: str | None) -> None:
    check_encoder(name, kernels_of(name).encode, importance, without=too_large_for(name))


# Read by code that all types share: those that read a row once, and Q4_0, which reads it twice.
@pytest.mark.parametrize("storage", ["bf16", "fp8"])
@pytest.mark.parametrize("name", ["Q4_K", "Q8_0", "IQ3_S", "Q4_0"])
def test_stored_rows_become_the_bytes_of_ggml(name: str, storage: str) -> None:
    check_encoder(name, kernels_of(name).encode, "random", storage, too_large_for(name))


@pytest.mark.parametrize("name", lanes.NAMES)
def test_random_blocks_become_the_numbers_of_ggml(name: str) -> None:
    check_decoder(name, kernels_of(name).decode, BY_NAME[name].factors)
