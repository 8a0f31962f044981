"""Rows of numbers as checkpoints store them, the way kernels take them: float32, BF16 as words, FP8 with its scales.

What is stored narrow stays narrow until a kernel widens it, in its first-level cache (lanes/encoder.py) or a chunk at
a time here, so that a unit's memory is the bytes that were read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FP8_TILE = 128  # columns that share a scale
FP8_LARGEST = 448  # of E4M3
CHUNK = 256 * 1024  # values that are widened at a time where a kernel wants float32


@dataclass(frozen=True, slots=True)
class Scaled:
    """FP8 E4M3 rows as stored: codes [n, columns] uint8, scales [n, column tiles of 128] float32."""

    codes: NDArray[np.uint8]
    scales: NDArray[np.float32]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape


# Rows [n, columns] as they are stored: float32, BF16 as uint16, or scaled FP8.
Values = NDArray[np.float32] | NDArray[np.uint16] | Scaled


def select_rows(values: Values, start: int, stop: int) -> Values:
    """Rows [start, stop), as a view."""
    if isinstance(values, Scaled):
        return Scaled(values.codes[start:stop], values.scales[start:stop])
    return values[start:stop]


def widen(values: Values, out: NDArray[np.float32]) -> None:
    """Write values [n, columns] as float32 into out, which has the same shape. All of these widen exactly."""
    if isinstance(values, Scaled):
        np.take(_FP8, values.codes, out=out)
        out *= np.repeat(values.scales, FP8_TILE, axis=1)[:, : out.shape[1]]
    elif values.dtype == np.uint16:
        np.left_shift(values, 16, out=out.view(np.uint32), dtype=np.uint32)
    else:
        out[:] = values


def widened_runs(values: Values) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Yield the rows as float32, CHUNK values at a time, each run with the number of its first row."""
    for start, stop in run_bounds(*values.shape):
        part = select_rows(values, start, stop)
        out = np.empty(part.shape, np.float32)
        widen(part, out)
        yield start, out


def run_bounds(n: int, columns: int) -> Iterator[tuple[int, int]]:
    """Yield [start, stop) of runs of CHUNK values, at least a row each; the last stop may lie behind row n."""
    step = max(1, CHUNK // columns)
    return ((start, start + step) for start in range(0, n, step))


def largest_magnitude(values: Values) -> float:
    """A bound of |value|, cheaper than widening; NaN or infinity if one value is."""
    if isinstance(values, Scaled):
        return float(np.abs(values.scales).max()) * FP8_LARGEST
    if values.dtype == np.uint16:
        # Without their signs, BF16 words are ordered as their numbers are, NaN last.
        word = np.bitwise_and(values, 0x7FFF).max(keepdims=True).astype(np.uint32)
        return float((word << 16).view(np.float32).item())
    return float(np.abs(values).max())


def fp8_table() -> NDArray[np.float32]:
    """The value of each of the 256 float8_e4m3fn codes: s eeee mmm, bias 7, no infinity, 0x7f and 0xff are NaN."""
    code = np.arange(256, dtype=np.int32)
    exponent, mantissa = (code >> 3) & 15, code & 7
    value = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    value = np.where((code & 0x7F) == 0x7F, np.nan, value)
    return np.where(code & 0x80, -value, value).astype(np.float32)


_FP8 = fp8_table()
