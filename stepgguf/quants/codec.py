"""quantize and dequantize: one call each, whatever the type.

Two kernels encode: our lanes, which give ggml's bytes several times faster, and ggml's own functions from the library
that llama-cpp-python ships, for the types that lanes do not have, for comparison (`--kernel ggml`), and as the oracle
of the tests. Where neither is there, gguf-py's numpy code encodes what it can.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import gguf.quants
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from stepgguf.errors import QuantError
from stepgguf.files import installed
from stepgguf.quants import ggml, lanes
from stepgguf.quants.ggml import BF16, F32, row_size

KERNELS = ("lanes", "ggml")
FP8_TILE = 128
_NUMPY_ENCODERS = frozenset(
    GGMLQuantizationType[name]
    for name in ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4")
)
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


def rows_of(values: Values, start: int, stop: int) -> Values:
    """Rows [start, stop)."""
    if isinstance(values, Scaled):
        return Scaled(values.codes[start:stop], values.scales[start:stop])
    return values[start:stop]


def widen(values: Values, out: NDArray[np.float32]) -> None:
    """values [n, columns] as float32, into out of the same shape."""
    if isinstance(values, Scaled):
        np.take(_FP8, values.codes, out=out)
        out *= np.repeat(values.scales, FP8_TILE, axis=1)[:, : out.shape[1]]
    elif values.dtype == np.uint16:
        np.left_shift(values, 16, out=out.view(np.uint32), dtype=np.uint32)
    else:
        out[:] = values


def check_encoder(kind: GGMLQuantizationType, *, has_imatrix: bool = False, kernel: str = "lanes") -> None:
    """Raise QuantError now if `quantize` could not encode this type here."""
    if kind in ggml.ABORT_WITHOUT_IMATRIX and not has_imatrix:
        raise QuantError(f"{kind.name} cannot be encoded without an importance matrix")
    if kernel == "lanes" and lanes.has(kind):
        return
    library = ggml.load()
    if library is not None:
        library.prepare(kind)
    elif kind not in _NUMPY_ENCODERS:
        raise QuantError(
            f"{kind.name} is encoded by ggml's library, which is not installed",
            hint=f"It ships with llama-cpp-python: {installed.with_extra('run')}",
        )


def quantize(
    kind: GGMLQuantizationType,
    values: Values,
    out: NDArray[np.uint8],
    importance: NDArray[np.float32] | None = None,
    *,
    kernel: str = "lanes",
) -> bool:
    """Encode values [n, columns] into out [n, row bytes]; importance: [columns]. Call `check_encoder` first.

    Returns whether all values are finite; if not, out is worthless.
    """
    if kind in ggml.GRIDS and ggml.ABORT_FROM <= _largest(values) < np.inf:
        raise QuantError(f"the values are too large for {kind.name}: no scale reaches {ggml.ABORT_FROM:g}")
    lane = lanes.lane_type(kind) if kernel == "lanes" else None
    if lane is None:
        return all(_quantize_widened(kind, chunk, part, importance) for chunk, part in _chunks(values, out))
    finite = bool(lane.encode(*_stored(values), importance, out))
    if finite:
        _check_scales(kind, out)
    return finite


@dataclass(frozen=True, slots=True)
class Loss:
    """What encoding rows lost: sums over their values x, their decoded values q and the importance w (1 without)."""

    weighted: float  # w (x - q)^2
    energy: float  # w x^2
    squared: float  # (x - q)^2

    def __add__(self, other: Loss) -> Loss:
        return Loss(self.weighted + other.weighted, self.energy + other.energy, self.squared + other.squared)


def loss(
    kind: GGMLQuantizationType,
    values: Values,
    data: NDArray[np.uint8],
    importance: NDArray[np.float32] | None = None,
) -> Loss:
    """Compare data [n, row bytes] with the values [n, columns] that it encodes; importance: [columns]."""
    lane = lanes.lane_type(kind)
    if lane is not None:
        sums = np.zeros(3)
        lane.measure(*_stored(values), importance, data, sums)
        return Loss(*map(float, sums))
    total = Loss(0.0, 0.0, 0.0)
    for chunk, part in _chunks(values, data):
        rows, decoded = np.empty(chunk.shape, np.float32), np.empty(chunk.shape, np.float32)
        widen(chunk, rows)
        dequantize(kind, part, decoded)
        squares = (rows - decoded) ** 2
        per_column, energy = squares.sum(0, np.float64), (rows**2).sum(0, np.float64)
        weights = np.ones(len(per_column)) if importance is None else importance
        total += Loss(float(per_column @ weights), float(energy @ weights), float(per_column.sum()))
    return total


def prepare(
    kind: GGMLQuantizationType, values: Values, *, weighted: bool, kernel: str, compiling: Callable[[str], None]
) -> None:
    """Compile what `quantize` and `loss` need for values like these, once per machine; `compiling` is told before."""
    lane = lanes.lane_type(kind)
    if lane is None:
        return
    codes, scales = _stored(values)
    importance = np.ones(values.shape[1], np.float32) if weighted else None
    out = np.empty((len(codes), row_size(kind, values.shape[1])), np.uint8)
    calls: list[tuple[Any, tuple[Any, ...]]] = [(lane.measure, (codes, scales, importance, out, np.zeros(3)))]
    if kernel == "lanes":
        calls.append((lane.encode, (codes, scales, importance, out)))
    if not all(lanes.is_compiled(function, arguments) for function, arguments in calls):
        compiling(kind.name)
    for function, arguments in calls:
        function(*arguments)


def dequantize(kind: GGMLQuantizationType, data: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
    """Decode data [n, row bytes] into out [n, columns], float32. What a damaged factor scales is not finite."""
    lane = lanes.lane_type(kind)
    if lane is not None:
        lane.decode(data, out)
    elif kind == BF16:
        np.left_shift(data.view(np.uint16).reshape(out.shape), 16, out=out.view(np.uint32), dtype=np.uint32)
    else:
        with np.errstate(invalid="ignore", over="ignore"):  # a damaged factor: its values are NaN or infinite
            for start, stop in _runs(*out.shape):
                out[start:stop] = gguf.quants.dequantize(data[start:stop], kind).reshape(-1, out.shape[1])


def widened_runs(values: Values) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Rows as float32, CHUNK values at a time, each run with the number of its first row."""
    n, columns = values.shape
    for start, stop in _runs(n, columns):
        part = rows_of(values, start, stop)
        out = np.empty(part.shape, np.float32)
        widen(part, out)
        yield start, out


def decoded_runs(kind: GGMLQuantizationType, data: NDArray[np.uint8]) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """The same of encoded rows, data [n, row bytes]."""
    block, n_bytes = GGML_QUANT_SIZES[kind]
    columns = data.shape[1] // n_bytes * block
    for start, stop in _runs(len(data), columns):
        out = np.empty((len(data[start:stop]), columns), np.float32)
        dequantize(kind, data[start:stop], out)
        yield start, out


def _runs(n: int, columns: int) -> Iterator[tuple[int, int]]:
    step = max(1, CHUNK // columns)
    return ((start, start + step) for start in range(0, n, step))


def _stored(values: Values) -> tuple[NDArray[Any], NDArray[np.float32] | None]:
    """As kernels take them: (values, scales)."""
    return (values.codes, values.scales) if isinstance(values, Scaled) else (values, None)


def _largest(values: Values) -> float:
    """A bound of |value|; NaN or infinity if one is."""
    if isinstance(values, Scaled):
        return float(np.abs(values.scales).max()) * 448  # E4M3's largest number
    if values.dtype == np.uint16:
        return float(
            (np.bitwise_and(values, 0x7FFF).max(keepdims=True).astype(np.uint32) << 16).view(np.float32).item()
        )
    return float(np.abs(values).max())


def _chunks(values: Values, out: NDArray[np.uint8]) -> list[tuple[Values, NDArray[np.uint8]]]:
    return [(rows_of(values, start, stop), out[start:stop]) for start, stop in _runs(*values.shape)]


def _quantize_widened(
    kind: GGMLQuantizationType, values: Values, out: NDArray[np.uint8], importance: NDArray[np.float32] | None
) -> bool:
    rows = np.empty(values.shape, np.float32)
    widen(values, rows)
    with np.errstate(over="ignore", invalid="ignore"):  # a sum that is not finite may come from large values alone
        if not np.isfinite(rows.sum()) and not np.isfinite(rows).all():
            return False
    library = ggml.load()
    if kind == F32:
        out.view(np.float32)[:] = rows
    elif library is not None:
        library.quantize(kind, rows, out, importance)
    else:
        out[:] = gguf.quants.quantize(rows, kind).view(np.uint8).reshape(out.shape)
    return True


# Where a block has its FP16 factors: byte offsets.
FACTORS = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,), "IQ3_XXS": (0,), "IQ3_S": (0,),
    "IQ2_XXS": (0,), "IQ2_XS": (0,), "IQ2_S": (0,), "MXFP4": (),
}  # fmt: skip


def _check_scales(kind: GGMLQuantizationType, out: NDArray[np.uint8]) -> None:
    """FP16 ends at 65504: values beyond what it can scale give an infinite factor, which ggml refuses too."""
    blocks = out.reshape(-1, GGML_QUANT_SIZES[kind][1])
    for offset in FACTORS[kind.name]:
        if ((blocks[:, offset + 1] & 0x7C) == 0x7C).any():
            raise QuantError(f"the values are too large for {kind.name}: a block's scale does not fit into FP16")


def fp8_table() -> NDArray[np.float32]:
    """The value of each of the 256 float8_e4m3fn codes: s eeee mmm, bias 7, no infinity, 0x7f and 0xff are NaN."""
    code = np.arange(256, dtype=np.int32)
    exponent, mantissa = (code >> 3) & 15, code & 7
    value = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    value = np.where((code & 0x7F) == 0x7F, np.nan, value)
    return np.where(code & 0x80, -value, value).astype(np.float32)


_FP8 = fp8_table()
