"""The search among 16 neighbours, by each of the ways that it picks terms, against numpy."""

from __future__ import annotations

from typing import Any

import llvmlite.binding
import numpy as np
import pytest

from stepgguf.quants.lanes.closest import CHUNK, ROW, Permutation, make_closest, transpose_terms
from stepgguf.quants.lanes.compile import inlined
from stepgguf.quants.lanes.vector import LANES

pytestmark = pytest.mark.slow

FEATURES = llvmlite.binding.get_host_cpu_features()
WAYS: dict[str, Permutation | None] = {
    "avx512f": ("llvm.x86.avx512.permvar.sf.512", 16),
    "avx2": ("llvm.x86.avx2.permps", 8),
    "any": None,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("size", "bits"), [(8, 2), (4, 3)])
def test_the_first_of_the_smallest_sums_wins(size: int, bits: int, way: str) -> None:
    if way != "any" and not FEATURES.get(way):
        pytest.skip(f"this processor has no {way}")
    search = make_closest(size, bits, WAYS[way])

    @inlined
    def search_all(terms: Any, lists: Any, results: Any) -> None:
        turned = np.empty(ROW * LANES, np.float32)
        transpose_terms(terms, turned)
        for lane in range(LANES):
            for chunk in range(results.shape[1]):
                results[lane, chunk] = search(turned, lane, lists, chunk)

    rng = np.random.default_rng(6)
    lists = rng.integers(0, 1 << 16 if size == 8 else 1 << 12, (40, CHUNK)).astype(np.uint16)
    # Lane 0 has ties, the others sums that depend on the order of additions.
    terms = rng.random((ROW, LANES)).astype(np.float32) ** 8
    terms[:, 0] = rng.integers(0, 3, ROW)
    results = np.empty((LANES, len(lists)), np.int64)
    search_all(terms.reshape(-1), lists.reshape(-1), results)

    sums = np.zeros((LANES, *lists.shape), np.float32)
    for i in range(size):
        sums += terms[(i << bits) + ((lists >> bits * i) & ((1 << bits) - 1))].transpose(2, 0, 1)
    first = sums.argmin(2) + np.arange(len(lists)) * CHUNK
    np.testing.assert_array_equal(results & 0xFFFFFFFF, first)
    np.testing.assert_array_equal(results >> 32, sums.min(2).view(np.int32))
