"""Blocks taken apart: ggml's bytes come back, and the parts mean what gguf-py decodes."""

from __future__ import annotations

from typing import Any

import gguf.quants
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import IQ4_NL

from stepgguf.quants.parts import TABLE, Parts, pack, take_apart
from stepgguf.quants.types import quant_type
from tests.oracle import library

KINDS = pytest.mark.parametrize("ggml_type", TABLE, ids=lambda kind: kind.name)


def ggml_blocks(ggml_type: GGMLQuantizationType) -> Any:
    """Blocks that ggml makes of rows of all sizes, with zeros, a constant and an outlier among them."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((16, 1024)).astype(np.float32) * np.exp2(rng.integers(-12, 6, (16, 1))).astype(
        np.float32
    )
    values[2, :256], values[3], values[4, 256:512], values[5, 7] = 0, 0, 0.25, 100
    block, size = GGML_QUANT_SIZES[ggml_type]
    data = np.empty((16, 1024 // block * size), np.uint8)
    library().quantize(ggml_type, values, data, rng.random(1024).astype(np.float32))
    return data


def random_blocks(ggml_type: GGMLQuantizationType) -> Any:
    """Blocks of random bytes, whose FP16 numbers are finite."""
    size = GGML_QUANT_SIZES[ggml_type][1]
    blocks = np.random.default_rng(1).integers(0, 256, (8, 4, size)).astype(np.uint8)
    for offset in quant_type(ggml_type).factors:
        blocks[..., offset + 1] &= 0xBF
    return blocks.reshape(8, -1)


def decoded(ggml_type: GGMLQuantizationType, parts: Parts) -> Any:
    layout = TABLE[ggml_type]
    codes = (
        np.array(IQ4_NL.kvalues)[parts.codes] if layout.uneven else parts.codes.astype(np.float32) - layout.codes.zero
    )
    subs = layout.block // layout.sub
    step = np.repeat(parts.factors, subs, 1) * parts.scales
    lowered = np.repeat(parts.minimum_factors, subs, 1) * parts.minimums
    return np.repeat(step, layout.sub, 1) * codes.astype(np.float32) - np.repeat(lowered, layout.sub, 1)


@KINDS
@pytest.mark.parametrize("make", [ggml_blocks, random_blocks])
def test_blocks_come_back_byte_for_byte(ggml_type: GGMLQuantizationType, make: Any) -> None:
    data = make(ggml_type)
    np.testing.assert_array_equal(pack(ggml_type, take_apart(ggml_type, data)), data)


@KINDS
@pytest.mark.parametrize("make", [ggml_blocks, random_blocks])
def test_the_parts_mean_what_gguf_py_decodes(ggml_type: GGMLQuantizationType, make: Any) -> None:
    data = make(ggml_type)
    values = decoded(ggml_type, take_apart(ggml_type, data))
    np.testing.assert_array_equal(values, gguf.quants.dequantize(data, ggml_type).reshape(values.shape))


@KINDS
def test_columns_of_parts_are_those_of_the_blocks(ggml_type: GGMLQuantizationType) -> None:
    data = ggml_blocks(ggml_type)
    part = take_apart(ggml_type, data).columns(TABLE[ggml_type], slice(256, 768))
    np.testing.assert_array_equal(pack(ggml_type, part), data[:, data.shape[1] // 4 : data.shape[1] * 3 // 4])
