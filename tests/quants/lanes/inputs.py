"""Rows that are hard for a kernel, and the checks that it encodes and decodes as ggml does, byte by byte.

Neighbouring rows are of different kinds, so that the lanes of one tile take different paths.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from stepgguf.errors import QuantError
from stepgguf.quants.types import row_size
from tests.oracle import library

Make = Callable[[np.random.Generator, int], Any]


def _with_one(values: Any, one: float) -> Any:
    values[len(values) // 3] = one
    return values


ROWS: dict[str, Make] = {
    "normal": lambda rng, n: rng.normal(size=n) * 0.02,
    "heavy-tailed": lambda rng, n: rng.standard_t(1.5, n) * 0.02,
    "zero": lambda rng, n: np.zeros(n),
    "negative zero": lambda rng, n: -np.zeros(n),
    "constant": lambda rng, n: np.full(n, 0.3),
    "constant, negative": lambda rng, n: np.full(n, -0.3),
    "positive": lambda rng, n: np.abs(rng.normal(size=n)),
    "negative": lambda rng, n: -np.abs(rng.normal(size=n)),
    "denormal": lambda rng, n: rng.normal(size=n) * 1e-40,
    "small": lambda rng, n: rng.normal(size=n) * 10.0 ** -rng.integers(6, 17, n),
    "around the least scales": lambda rng, n: rng.normal(size=n) * 10.0 ** -(6 + np.arange(n) * 16 // n % 12),
    "large": lambda rng, n: rng.normal(size=n) * 1e5,
    "huge": lambda rng, n: rng.normal(size=n) * 1e30,
    "one huge": lambda rng, n: _with_one(rng.normal(size=n), 1e30),
    "one value": lambda rng, n: _with_one(np.zeros(n), -1.0),
    "outlier": lambda rng, n: _with_one(rng.normal(size=n), 300.0),
    "sparse": lambda rng, n: rng.normal(size=n) * (rng.random(n) < 0.05),
    "ties": lambda rng, n: rng.integers(-8, 9, n) / 8,
    "two signs of zero": lambda rng, n: np.where(rng.random(n) < 0.5, 0.0, -0.0) + _with_one(np.zeros(n), 1.0),
    "growing": lambda rng, n: rng.normal(size=n) * 2.0 ** (np.arange(n) // 16 % 24 - 20),
    "flat with noise": lambda rng, n: 1 + rng.normal(size=n) * 1e-6,
}
IMPORTANCES: dict[str, Make] = {
    "random": lambda rng, n: rng.random(n) + 0.01,
    "heavy-tailed": lambda rng, n: rng.standard_t(1.5, n) ** 2,
    "with zeros": lambda rng, n: rng.random(n) * (rng.random(n) < 0.6),
    "zero blocks": lambda rng, n: rng.random(n) * (np.arange(n) // 32 % 3 > 0),
    "tiny": lambda rng, n: rng.random(n) * 1e-30,
}
SHAPES = ((1, 3), (7, 1), (33, 2), (64, 16))  # rows, blocks


def check_encoder(
    name: str, encode: Any, importance: str | None, storage: str = "f32", without: Collection[str] = ()
) -> None:
    """`encode` makes ggml's bytes for all kinds of rows except `without` (which are those that ggml aborts on).

    importance: a name in IMPORTANCES, or None. storage: f32, bf16 or fp8 (whose rows are random bytes).
    """
    block, _ = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    for n_rows, n_blocks in SHAPES:
        rng = np.random.default_rng(n_rows)
        columns = n_blocks * block
        stored, scales, values = _stored(rng, _rows(rng, n_rows, columns, without), storage)
        weights = None if importance is None else IMPORTANCES[importance](rng, columns).astype(np.float32)
        check_rows(name, encode, stored, scales, values, weights)


def check_decoder(name: str, decode: Any, halves: Collection[int]) -> None:
    """`decode` makes ggml's numbers, bit by bit, of random bytes.

    halves: where a block has FP16 numbers; those become finite, as in every valid file.
    """
    ggml_type = GGMLQuantizationType[name]
    block, size = GGML_QUANT_SIZES[ggml_type]
    for n_rows, n_blocks in SHAPES:
        blocks = np.random.default_rng(n_rows).integers(0, 256, (n_rows, n_blocks, size)).astype(np.uint8)
        for i in halves:
            upper = blocks[..., i + 1]
            upper[(upper & 0x7C) == 0x7C] &= 0xBF
        blocks = blocks.reshape(n_rows, -1)
        ours, theirs = np.empty((2, n_rows, n_blocks * block), np.float32)
        decode(blocks, ours)
        library().dequantize(ggml_type, blocks, theirs)
        np.testing.assert_array_equal(ours.view(np.uint32), theirs.view(np.uint32), f"{name}, {ours.shape}")


def _rows(rng: np.random.Generator, n_rows: int, columns: int, without: Collection[str]) -> Any:
    makes = [make for described, make in ROWS.items() if described not in without]
    return np.stack([makes[r % len(makes)](rng, columns) for r in range(n_rows)]).astype(np.float32)


def _stored(rng: np.random.Generator, values: Any, storage: str) -> tuple[Any, Any, Any]:
    """(rows as stored, their scales, the float32 that they mean)."""
    if storage == "f32":
        return values, None, values
    if storage == "bf16":
        upper = (values.view(np.uint32) >> 16).astype(np.uint16)
        return upper, None, (upper.astype(np.uint32) << 16).view(np.float32)
    n_rows, columns = values.shape
    stored = rng.integers(0, 256, values.shape).astype(np.uint8)
    stored[(stored & 0x7F) == 0x7F] = 0
    scales = rng.uniform(1e-4, 1e-3, (n_rows, -(-columns // 128))).astype(np.float32)
    return stored, scales, _fp8_values()[stored] * np.repeat(scales, 128, axis=1)[:, :columns]


def _fp8_values() -> Any:
    """The numbers of E4M3: sign, 4 bits of exponent, 3 bits of fraction."""
    code = np.arange(256)
    exponent, fraction = (code >> 3) & 15, (code & 7) / 8
    magnitude = np.where(exponent > 0, (1 + fraction) * 2.0 ** (exponent - 7), fraction * 2.0**-6)
    return np.where(code < 128, magnitude, -magnitude).astype(np.float32)


def check_rows(name: str, encode: Any, stored: Any, scales: Any, values: Any, weights: Any) -> None:
    """`encode` makes ggml's bytes of rows `stored` with `scales`, that mean the float32 `values`; most are valid."""
    ggml_type = GGMLQuantizationType[name]
    size = row_size(ggml_type, values.shape[1])
    ours = np.empty((len(values), size), np.uint8)
    assert encode(stored, scales, weights, ours)
    n_accepted = 0
    for r, (row, our) in enumerate(zip(values, ours, strict=True)):
        theirs = np.empty(size, np.uint8)
        try:
            library().quantize(ggml_type, row[None], theirs, weights)
        except QuantError:
            continue  # a scale that is not finite
        n_accepted += 1
        np.testing.assert_array_equal(our, theirs, f"{name}, row {r} of {values.shape}")
    assert n_accepted > len(values) // 2


def check_valid(name: str, encode: Any, rows: Any, weights: Any) -> None:
    """`encode` makes ggml's bytes of float32 rows all of which are valid."""
    ggml_type = GGMLQuantizationType[name]
    ours, theirs = np.empty((2, len(rows), row_size(ggml_type, rows.shape[1])), np.uint8)
    assert encode(rows, None, weights, ours)
    library().quantize(ggml_type, rows, theirs, weights)
    np.testing.assert_array_equal(ours, theirs)
