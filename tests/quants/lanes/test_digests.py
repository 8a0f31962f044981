"""The bytes are the same on every machine, whatever its vectors and whatever its build of ggml contracts into FMA.

On x86-64 they are ggml's, which the other files here test. Elsewhere ggml's own bytes may differ: there the contract is
the digests below, and an error no higher than ggml's.
"""

from __future__ import annotations

import hashlib
from typing import Any, get_args

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from stepgguf.quants import KernelName, lanes
from stepgguf.quants.kernels import choose_kernel, decoder_for
from stepgguf.quants.types import BY_NAME, row_size

pytestmark = pytest.mark.slow

CASES = [(n, w) for n in lanes.NAMES for w in (True, False) if w or not BY_NAME[n].aborts]
# SHA-256, the first 16 digits, of the blocks of `portable_rows`: with importance and without.
DIGESTS: dict[str, tuple[str, str | None]] = {
    "Q2_K": ("766bcd2d2dfad243", "1bd70983744dc949"),
    "Q4_K": ("65ef0183dd9631b8", "8a02957239a99edd"),
    "Q5_K": ("e628380737c07a86", "f547552a05faa650"),
    "Q3_K": ("b35d2c63dd8534c9", "390109ac9a23e0b9"),
    "Q6_K": ("0e76e3e2a013baf3", "230d1690c13fd6c6"),
    "IQ4_NL": ("23d83b4e842a5a12", "6633575dbf76c7cd"),
    "IQ4_XS": ("ca3b926b2ea6d89f", "044c763adcc23455"),
    "IQ3_XXS": ("d8fcfa60db8e8db5", "008b3b20082f2c4c"),
    "IQ3_S": ("221b9f63948fbe60", "0a3990c2b5faee0b"),
    "IQ2_XXS": ("0b03a8991f9bb15a", None),
    "IQ2_XS": ("a73df6e069d89f17", None),
    "IQ2_S": ("5865b6e70f3541c0", "db7886e83ee4521d"),
    "Q4_0": ("fbfff0305ed91133", "c06c8a60cd584544"),
    "Q4_1": ("09ae18b4f14f71ac", "1662e5a783d5e292"),
    "Q5_0": ("5da59d897d964163", "5a5447b13a487031"),
    "Q5_1": ("9304eb1581777a0a", "c959dcabddabe441"),
    "Q8_0": ("69e4a4f46835585d", "69e4a4f46835585d"),
    "MXFP4": ("ce0eb8f20e7c9978", "ce0eb8f20e7c9978"),
}


def portable_rows() -> tuple[Any, Any]:
    """(values [96, 512], importance [512]) from integers alone: a generator that is frozen, and no mathematical
    library, whose last bit may be another on another machine."""
    random = np.random.RandomState(0)
    levels = random.randint(-2048, 2048, (96, 512)) * random.randint(0, 2048, (96, 512)) // 2048
    scales = 2.0 ** random.randint(-20, -6, (96, 16)).repeat(32, 1)
    values = (levels * scales).astype(np.float32)
    values[5], values[6, 32:64], values[7, 1:] = 0, 0, 0
    return values, (random.randint(0, 2000, 512) / 64).astype(np.float32)


def encode_rows(name: str, weighted: bool, wish: KernelName = "lanes") -> Any:
    values, importance = portable_rows()
    out = np.empty((len(values), row_size(GGMLQuantizationType[name], values.shape[1])), np.uint8)
    kernel = choose_kernel(GGMLQuantizationType[name], wish, weighted=weighted)
    assert kernel.encode(values, out, importance if weighted else None)
    return out


@pytest.mark.parametrize(("name", "weighted"), CASES)
def test_the_bytes_are_those_of_every_other_machine(name: str, weighted: bool) -> None:
    assert hashlib.sha256(encode_rows(name, weighted)).hexdigest()[:16] == DIGESTS[name][0 if weighted else 1]


@pytest.mark.parametrize(("name", "weighted"), CASES)
def test_the_error_is_no_higher_than_ggmls(name: str, weighted: bool) -> None:
    values, importance = portable_rows()
    ours, theirs = (
        decoder_for(GGMLQuantizationType[name]).measure(
            values, encode_rows(name, weighted, wish), importance if weighted else None
        )
        for wish in get_args(KernelName)
    )
    # Where a sum is rounded once less, one of two candidates that are equal within float32's 2^-24 may win.
    assert ours.weighted <= theirs.weighted * (1 + 2.0**-20)
