"""Numbers to blocks and back: a Kernel encodes, decodes and measures one type, and is chosen once per tensor.

                encode                                  decode, measure
    lanes       our lanes (lanes/): ggml's bytes,       our lanes
                several times faster
    ggml        ggml's own functions: for types that    our lanes where they have the type, else gguf-py
                lanes do not have, and to compare
                (`--kernel ggml`)
    gguf-py     numpy: where ggml's library is not      likewise
                installed

Choosing loads neither numba nor a lane, so a plan is made without them; a kernel loads its lane when it is first used.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING

import gguf.quants
import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from stepgguf.errors import QuantError
from stepgguf.quants import KernelName, ggml, lanes
from stepgguf.quants.ggml import Ggml
from stepgguf.quants.types import BF16, F32, quant_type, row_size
from stepgguf.quants.values import CHUNK, Scaled, Values, largest_magnitude, run_bounds, widened_runs

if TYPE_CHECKING:
    from stepgguf.quants.lanes.lane_kernels import LaneKernels
    from stepgguf.quants.lanes.operands import Stored


Blocks = NDArray[np.uint8]  # encoded rows [n, row bytes]
Floats = NDArray[np.float32]
LaneCall = tuple[Callable[..., object], tuple[object, ...]]  # one of our kernels, and its arguments


@dataclass(frozen=True, slots=True)
class Loss:
    """What encoding rows lost: sums over their values x, their decoded values q and the importance w (1 without)."""

    weighted: float  # w (x - q)^2
    energy: float  # w x^2
    squared: float  # (x - q)^2

    def __add__(self, other: Loss) -> Loss:
        return Loss(self.weighted + other.weighted, self.energy + other.energy, self.squared + other.squared)


class Decoder:
    """Decodes blocks of one type, and says what was lost when they were made. `decoder_for` gives one."""

    def __init__(self, ggml_type: GGMLQuantizationType) -> None:
        self.quant_type = quant_type(ggml_type)

    @property
    def ggml_type(self) -> GGMLQuantizationType:
        return self.quant_type.ggml_type

    @cached_property
    def _lane(self) -> LaneKernels | None:
        """Our kernels of this type, if it has some. Imports numba when it is first asked."""
        return lanes.kernels_of(self.ggml_type)

    def decode(self, data: Blocks, out: Floats) -> None:
        """Decode data into out [n, columns]. What a damaged factor scales is not finite."""
        if self._lane is not None:
            self._lane.decode(data, out)
        elif self.ggml_type == BF16:
            np.left_shift(data.view(np.uint16).reshape(out.shape), 16, out=out.view(np.uint32), dtype=np.uint32)
        else:
            with np.errstate(invalid="ignore", over="ignore"):  # a damaged factor: its values are NaN or infinite
                for start, stop in run_bounds(*out.shape):
                    part = gguf.quants.dequantize(data[start:stop], self.ggml_type)
                    out[start:stop] = part.reshape(-1, out.shape[1])

    def decoded_runs(self, data: Blocks) -> Iterator[tuple[int, Floats]]:
        """Yield the decoded rows, CHUNK values at a time, each run with the number of its first row."""
        columns = data.shape[1] // self.quant_type.block_bytes * self.quant_type.block
        for start, stop in run_bounds(len(data), columns):
            out = np.empty((len(data[start:stop]), columns), np.float32)
            self.decode(data[start:stop], out)
            yield start, out

    def measure(self, values: Values, data: Blocks, importance: Floats | None = None) -> Loss:
        """Compare data with the values [n, columns] that it encodes; importance: [columns]."""
        if self._lane is not None:
            sums = np.zeros(3)
            self._lane.measure(*_as_lanes_take(values), importance, data, sums)
            return Loss(*map(float, sums))
        total = Loss(0.0, 0.0, 0.0)
        for start, rows in widened_runs(values):
            decoded = np.empty_like(rows)
            self.decode(data[start : start + len(rows)], decoded)
            squares = (rows - decoded) ** 2
            per_column, energy = squares.sum(0, np.float64), (rows**2).sum(0, np.float64)
            weights = np.ones(len(per_column)) if importance is None else importance
            total += Loss(float(per_column @ weights), float(energy @ weights), float(per_column.sum()))
        return total


class Kernel(Decoder, ABC):
    """Also encodes. `choose_kernel` gives one of the classes below."""

    def encode(self, values: Values, out: Blocks, importance: Floats | None = None) -> bool:
        """Encode values [n, columns] into out [n, row bytes]; importance: [columns].

        Returns whether all values are finite; if not, out is worthless. QuantError if they are too large for the type.
        """
        if self.quant_type.grid and ggml.ABORT_FROM <= largest_magnitude(values) < np.inf:
            raise QuantError(
                f"the values are too large for {self.quant_type.name}: no scale reaches {ggml.ABORT_FROM:g}"
            )
        return self._encode(values, out, importance)

    @abstractmethod
    def _encode(self, values: Values, out: Blocks, importance: Floats | None) -> bool:
        """Encode values that are not too large."""

    def compile(self, values: Values, *, weighted: bool, compiling: Callable[[str], None]) -> None:
        """Compile what values like these need, once per machine; `compiling` is called with the type's name before."""
        if self._lane is None:
            return
        importance = np.ones(values.shape[1], np.float32) if weighted else None
        out = np.empty((values.shape[0], row_size(self.ggml_type, values.shape[1])), np.uint8)
        calls = self._lane_calls(values, out, importance)
        if not all(lanes.is_compiled(function, arguments) for function, arguments in calls):
            compiling(self.quant_type.name)
        for function, arguments in calls:
            function(*arguments)

    def _lane_calls(self, values: Values, out: Blocks, importance: Floats | None) -> list[LaneCall]:
        """The calls that a tensor's life makes, as (lane kernel, arguments)."""
        assert self._lane is not None
        return [(self._lane.measure, (*_as_lanes_take(values), importance, out, np.zeros(3)))]


class LaneKernel(Kernel):
    """Our lanes, which widen the values themselves."""

    def _encode(self, values: Values, out: Blocks, importance: Floats | None) -> bool:
        assert self._lane is not None
        finite = self._lane.encode(*_as_lanes_take(values), importance, out)
        if finite:
            self._check_factors(out)
        return finite

    def _check_factors(self, out: Blocks) -> None:
        """FP16 ends at 65504: values beyond what it can scale give an infinite factor, which ggml refuses too."""
        blocks = out.reshape(-1, self.quant_type.block_bytes)
        for offset in self.quant_type.factors:
            if ((blocks[:, offset + 1] & 0x7C) == 0x7C).any():  # all five bits of the exponent
                raise QuantError(
                    f"the values are too large for {self.quant_type.name}: a block's scale does not fit into FP16"
                )

    def _lane_calls(self, values: Values, out: Blocks, importance: Floats | None) -> list[LaneCall]:
        assert self._lane is not None
        encode = self._lane.encode, (*_as_lanes_take(values), importance, out)
        return [*super()._lane_calls(values, out, importance), encode]


class WideningKernel(Kernel):
    """An encoder of others, which wants float32 rows."""

    def _encode(self, values: Values, out: Blocks, importance: Floats | None) -> bool:
        for start, rows in widened_runs(values):
            with np.errstate(over="ignore", invalid="ignore"):  # large values alone may make a sum infinite
                if not np.isfinite(rows.sum()) and not np.isfinite(rows).all():
                    return False
            self._encode_rows(rows, out[start : start + len(rows)], importance)
        return True

    @abstractmethod
    def _encode_rows(self, rows: Floats, out: Blocks, importance: Floats | None) -> None:
        """Encode rows that are finite."""


class NumpyKernel(WideningKernel):
    """gguf-py's encoders, which know no importance."""

    def _encode_rows(self, rows: Floats, out: Blocks, importance: Floats | None) -> None:
        out[:] = gguf.quants.quantize(rows, self.ggml_type).view(np.uint8).reshape(out.shape)


class GgmlKernel(WideningKernel):
    """ggml's own encoders."""

    def __init__(self, ggml_type: GGMLQuantizationType, library: Ggml) -> None:
        super().__init__(ggml_type)
        self._library = library
        library.prepare(ggml_type)

    def _encode_rows(self, rows: Floats, out: Blocks, importance: Floats | None) -> None:
        self._library.quantize(self.ggml_type, rows, out, importance)


# One object for each type, so that its lane is looked up once and plans that are equal compare equal.
decoder_for = cache(Decoder)
_lane_kernel, _numpy_kernel, _ggml_kernel = cache(LaneKernel), cache(NumpyKernel), cache(GgmlKernel)


def choose_kernel(ggml_type: GGMLQuantizationType, wish: KernelName = "lanes", *, weighted: bool) -> Kernel:
    """What encodes this type here: our lanes unless `wish` is "ggml". weighted: with importance.

    QuantError if the type cannot do without importance, and if nothing that is installed encodes it.
    """
    row = quant_type(ggml_type)
    if row.aborts and not weighted:
        raise QuantError(f"{row.name} cannot be encoded without an importance matrix")
    if wish == "lanes" and row.lanes is not None:
        return _lane_kernel(ggml_type)
    library = ggml.load_library()
    if library is not None and ggml_type != F32:  # F32 is a copy, which needs no library
        return _ggml_kernel(ggml_type, library)
    if row.numpy:
        return _numpy_kernel(ggml_type)
    raise QuantError(
        f"{row.name} is encoded by ggml's library, which is not installed",
        hint="It ships with llama-cpp-python: stepgguf setup",
    )


def scratch_bytes(n_values: int) -> int:
    """The most bytes that a kernel holds besides so many values and their blocks: four arrays of a widened chunk."""
    return 4 * 4 * min(CHUNK, n_values)


def _as_lanes_take(values: Values) -> tuple[Stored, Floats | None]:
    """The stored values and their scales (None without), which lane kernels take as two arguments."""
    return (values.codes, values.scales) if isinstance(values, Scaled) else (values, None)
