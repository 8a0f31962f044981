"""How shards store numbers: a class for each encoding, and all of them in ENCODINGS.

    F32, F16, BF16   the numbers
    FP8Blocks        F8_E4M3 codes; in NAME_scale_inv (F32 or BF16) one scale for each 128 x 128 tile of a matrix

A stored tensor has the encoding with its dtype, where several have it that one whose scales lie beside it. What an
encoding is called in quantization_config is not asked: its list of modules has runtime names and matches nothing on
disk.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from stepgguf.convert.sources.shards import StoredTensor
from stepgguf.convert.sources.source import Shape
from stepgguf.errors import ShapeMismatch
from stepgguf.quants.values import FP8_TILE, Scaled, Values, widen

T = GGMLQuantizationType


@dataclass(frozen=True, slots=True)
class ScaleTensor:
    """What is stored beside an encoding's data, as NAME + suffix: a number for each tile of (rows, columns)."""

    suffix: str
    dtypes: tuple[str, ...]
    tile: tuple[int, int]

    def check_stored(self, found: StoredTensor, shape: Shape) -> None:
        """ShapeMismatch if `found` cannot be the scales of a tensor of this shape."""
        *lead, rows, columns = shape if len(shape) > 1 else (1, *shape)
        height, width = self.tile
        expected = (*lead, -(-rows // height), -(-columns // width))
        if found.shape != expected or found.dtype not in self.dtypes:
            raise ShapeMismatch(
                f"{found.shard.name}: {found.name} is {found.dtype} {list(found.shape)}, expected {self.dtypes[0]} "
                f"{list(expected)} ({height} x {width} blocks)",
                hint="Convert from the BF16 or the FP8 checkpoint.",
            )

    def stored_rows(self, found: StoredTensor, number: int, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """For each of these rows of matrix `number` the row of `found` that has its scales, of all its matrices'."""
        return number * found.shape[-2] + rows // self.tile[0]


class StoredEncoding(ABC):
    """One way to store numbers.

    dtype: what safetensors' headers call the data's. ggml_type: the GGUF type with the same bytes, if there is one.
    is_view: whether `decode` gives the stored bytes themselves, or else new numbers made of them.
    """

    dtype: ClassVar[str]
    ggml_type: ClassVar[GGMLQuantizationType | None] = None
    scales: ClassVar[tuple[ScaleTensor, ...]] = ()  # what must be stored beside the data
    is_view: ClassVar[bool] = True

    def data_shape(self, shape: Shape) -> Shape:
        """The shape that the stored tensor has for a tensor of this shape."""
        return shape

    @abstractmethod
    def decode(self, data: NDArray[np.uint8], scales: Sequence[NDArray[np.float32]]) -> Values:
        """Rows as kernels take them, of data [n, row bytes] and for each of `scales` [n, column tiles]."""


class BF16(StoredEncoding):
    """What StepFun publishes. Kernels widen the words themselves."""

    dtype, ggml_type = "BF16", T.BF16

    def decode(self, data: NDArray[np.uint8], scales: Sequence[NDArray[np.float32]]) -> Values:
        return data.view(np.uint16)


class F16(StoredEncoding):
    """What some merges are saved as. No kernel takes it, so it is widened here; every F16 is an F32."""

    dtype, ggml_type, is_view = "F16", T.F16, False

    def decode(self, data: NDArray[np.uint8], scales: Sequence[NDArray[np.float32]]) -> Values:
        return data.view(np.float16).astype(np.float32)


class F32(StoredEncoding):
    """The router's bias in every checkpoint; all tensors in some."""

    dtype, ggml_type = "F32", T.F32

    def decode(self, data: NDArray[np.uint8], scales: Sequence[NDArray[np.float32]]) -> Values:
        return data.view(np.float32)


class FP8Blocks(StoredEncoding):
    """StepFun's FP8, DeepSeek-V3's form: value = code * scale of its tile. Kernels widen the codes themselves."""

    dtype = "F8_E4M3"
    scales = (ScaleTensor("_scale_inv", ("F32", "BF16"), (FP8_TILE, FP8_TILE)),)

    def decode(self, data: NDArray[np.uint8], scales: Sequence[NDArray[np.float32]]) -> Values:
        return Scaled(data, scales[0])


ENCODINGS: tuple[StoredEncoding, ...] = (BF16(), F16(), F32(), FP8Blocks())
DTYPES = tuple(dict.fromkeys(encoding.dtype for encoding in ENCODINGS))


def encoding_of(name: str, stored: Mapping[str, StoredTensor]) -> StoredEncoding | None:
    """The encoding of stored[name]; where none has all its scales the first with the dtype, None for another dtype."""
    fitting = [encoding for encoding in ENCODINGS if encoding.dtype == stored[name].dtype]
    complete = (e for e in fitting if all(name + scale.suffix in stored for scale in e.scales))
    return next(complete, fitting[0] if fitting else None)


def scale_names(stored: Mapping[str, StoredTensor]) -> set[str]:
    """The names of all that is stored beside tensors as their scales, or should be."""
    encodings = ((name, encoding_of(name, stored)) for name in stored)
    return {name + scale.suffix for name, encoding in encodings if encoding for scale in encoding.scales}


def widen_scales(dtype: str, data: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Rows of stored scales as float32."""
    stored: Values = data.view(np.uint16) if dtype == "BF16" else data.view(np.float32)
    scales = np.empty(stored.shape, np.float32)
    widen(stored, scales)
    return scales
