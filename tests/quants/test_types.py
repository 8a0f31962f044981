"""The table of types against those who know: ggml's library, gguf-py and the lanes."""

from __future__ import annotations

import ctypes
import importlib

import gguf.quants
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from stepgguf.quants import ggml
from stepgguf.quants.mixtures import BASE_TYPES
from stepgguf.quants.types import TABLE, QuantType, quant_type

T = GGMLQuantizationType
by_name = pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)


def test_every_type_that_a_mixture_starts_from_has_a_row() -> None:
    assert {row.ggml_type for row in TABLE} == set(BASE_TYPES.values())
    assert len({row.ggml_type for row in TABLE}) == len(TABLE)


@by_name
def test_ggml_aborts_without_an_imatrix_where_the_table_says_so(row: QuantType) -> None:
    library = ggml.load_library()
    assert library is not None
    requires = ctypes.CDLL(str(library.path)).ggml_quantize_requires_imatrix
    requires.restype = ctypes.c_bool
    assert requires(int(row.ggml_type)) == row.aborts
    assert row.imatrix or not row.aborts


@by_name
def test_gguf_py_encodes_what_the_table_says_it_does(row: QuantType) -> None:
    rows = np.random.default_rng(0).standard_normal((2, row.block), np.float32)
    if row.numpy:
        assert gguf.quants.quantize(rows, row.ggml_type).nbytes == 2 * row.block_bytes
    else:
        with pytest.raises(NotImplementedError):
            gguf.quants.quantize(rows, row.ggml_type)


@by_name
def test_the_lanes_of_a_type_are_where_the_table_says(row: QuantType) -> None:
    families = {"plain", "k_mins", "k_scales", "iq4", "iq3", "iq2"}
    found = {f for f in families if row.name in importlib.import_module(f"stepgguf.quants.lanes.{f}").TYPES}
    assert found == ({row.lanes} if row.lanes else set())


@pytest.mark.parametrize("row", [row for row in TABLE if row.factors], ids=lambda row: row.name)
def test_factors_are_where_infinity_makes_a_block_of_zeros_worthless(row: QuantType) -> None:
    """Anywhere else it is levels and scales, which a factor of zero turns to zeros."""
    found = []
    for offset in range(0, row.block_bytes - 1, 2):
        block = np.zeros((1, row.block_bytes), np.uint8)
        block[0, offset : offset + 2] = 0x00, 0x7C
        with np.errstate(invalid="ignore"):
            if not np.isfinite(gguf.quants.dequantize(block, row.ggml_type)).all():
                found.append(offset)
    assert tuple(found) == row.factors


@by_name
def test_factors_lie_inside_a_block_and_what_takes_a_types_place_divides_more_rows(row: QuantType) -> None:
    assert all(0 <= offset <= row.block_bytes - 2 for offset in row.factors)
    if row.fallback is not None:
        assert row.block % quant_type(row.fallback).block == 0
        assert quant_type(row.fallback).block < row.block


def test_types_that_are_not_in_the_table_have_sizes() -> None:
    for ggml_type, (block, n_bytes) in GGML_QUANT_SIZES.items():
        row = quant_type(ggml_type)
        assert (row.block, row.block_bytes, row.bpw) == (block, n_bytes, 8 * n_bytes / block)
    assert quant_type(T.I32).lanes is None
