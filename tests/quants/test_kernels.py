"""Kernels against gguf-py's independent encoders and ggml's decoders."""

from __future__ import annotations

from typing import get_args

import gguf.quants
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType

from stepgguf.errors import QuantError
from stepgguf.quants import KernelName, ggml, lanes
from stepgguf.quants.kernels import choose_kernel, decoder_for
from stepgguf.quants.types import BY_NAME, row_size
from stepgguf.quants.values import fp8_table

pytestmark = pytest.mark.slow

T = GGMLQuantizationType
BOTH = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4"]


def rows(seed: int = 0) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((16, 1024), np.float32) * rng.uniform(1e-3, 30, (16, 1)).astype(np.float32)
    values[3, :256] = 0.0
    values[5, 7] = 1000.0
    return values


def encode(kind: T, values: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    out = np.empty((len(values), row_size(kind, values.shape[1])), np.uint8)
    assert choose_kernel(kind, weighted=False).encode(values, out)
    return out


@pytest.mark.parametrize("name", BOTH)
def test_ggml_and_gguf_py_encode_the_same_bytes(name: str) -> None:
    kind, values = T[name], rows()
    assert ggml.load_library() is not None
    theirs = gguf.quants.quantize(values, kind).view(np.uint8).reshape(len(values), -1)
    np.testing.assert_array_equal(encode(kind, values), theirs)


@pytest.mark.parametrize("name", BOTH)
def test_without_the_library_the_bytes_are_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, values = T[name], rows(1)
    with_library = encode(kind, values)
    monkeypatch.setattr(ggml, "load_library", lambda: None)
    np.testing.assert_array_equal(encode(kind, values), with_library)


@pytest.mark.parametrize("name", [*BOTH, *sorted(set(lanes.NAMES) - {*BOTH}), "IQ1_S", "IQ1_M"])
def test_decoding_is_ggmls_bit_for_bit(name: str) -> None:
    kind, values = T[name], rows(2)
    importance = np.ones(values.shape[1], np.float32)
    data = np.empty((len(values), row_size(kind, values.shape[1])), np.uint8)
    assert choose_kernel(kind, weighted=True).encode(values, data, importance)
    ours, theirs = np.empty((2, *values.shape), np.float32)
    decoder_for(kind).decode(data, ours)
    library = ggml.load_library()
    assert library is not None
    if kind == T.F32:
        theirs[:] = values
    else:
        library.dequantize(kind, data, theirs)
    np.testing.assert_array_equal(ours.view(np.uint32), theirs.view(np.uint32))


@pytest.mark.parametrize("name", sorted(name for name in lanes.NAMES if BY_NAME[name].factors))
def test_factors_that_are_not_finite_decode_as_gguf_py_has_it(name: str) -> None:
    """Random blocks whose FP16 factors are infinite, NaN, or the largest and smallest that are neither."""
    kind, rng = T[name], np.random.default_rng(4)
    halves = np.array([0x7C00, 0xFC00, 0x7E00, 0xFE00, 0x7C01, 0x7FFF, 0x7BFF, 0x0001, 0x8000, 0x3C00], np.uint16)
    size = gguf.GGML_QUANT_SIZES[kind][1]
    blocks = rng.integers(0, 256, (64, 4, size), np.uint8)
    for offset in BY_NAME[name].factors:
        blocks[..., offset : offset + 2] = rng.choice(halves, (64, 4, 1)).view(np.uint8)
    data = blocks.reshape(64, -1)
    with np.errstate(invalid="ignore", over="ignore"):
        theirs = gguf.quants.dequantize(data, kind)
    ours = np.empty(theirs.shape, np.float32)
    decoder_for(kind).decode(data, ours)
    assert not np.isfinite(theirs).all()
    np.testing.assert_array_equal(np.isnan(ours), np.isnan(theirs))
    ours[np.isnan(ours)], theirs[np.isnan(theirs)] = 0.0, 0.0  # which NaN it is depends on the processor
    np.testing.assert_array_equal(ours.view(np.uint32), theirs.view(np.uint32))


@pytest.mark.parametrize("wish", get_args(KernelName))
@pytest.mark.parametrize("name", ["IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"])
@pytest.mark.parametrize("size", [1e10, 1e30, 3e38])
def test_values_that_ggml_would_abort_on_are_an_error(name: str, wish: KernelName, size: float) -> None:
    values = rows()
    values[7] *= np.float32(size / np.abs(values[7]).max())
    out = np.empty((len(values), row_size(T[name], values.shape[1])), np.uint8)
    with pytest.raises(QuantError, match=f"too large for {name}"):
        choose_kernel(T[name], wish, weighted=True).encode(values, out, np.ones(values.shape[1], np.float32))


def test_the_fp8_table_is_torchs() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(fp8_table(), codes)


def test_types_that_abort_the_process_are_refused() -> None:
    with pytest.raises(QuantError, match="IQ2_XXS cannot be encoded without an importance matrix"):
        choose_kernel(T.IQ2_XXS, weighted=False)


def test_types_that_only_the_library_encodes_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ggml, "load_library", lambda: None)
    choose_kernel(T.Q4_K, weighted=False)
    with pytest.raises(QuantError, match="IQ1_M is encoded by ggml's library") as caught:
        choose_kernel(T.IQ1_M, weighted=False)
    with pytest.raises(QuantError, match="Q4_K is encoded by ggml's library"):
        choose_kernel(T.Q4_K, "ggml", weighted=True)
    assert "stepgguf setup" in (caught.value.hint or "")


def test_a_row_that_does_not_divide_is_named() -> None:
    with pytest.raises(QuantError, match="rows of 100 values do not divide into Q4_K blocks of 256"):
        row_size(T.Q4_K, 100)
