"""Where tensors come from: the protocol that a safetensors checkpoint and a GGUF file both fulfil."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from stepgguf.files.gguf_header import Key
from stepgguf.model.hparams import AnyHParams
from stepgguf.model.names import TensorName
from stepgguf.model.tensors import TensorSpec
from stepgguf.quants.values import Values

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """How the source stores a tensor.

    dtype: what its numbers are called there. ggml_type: the GGUF type with the same bytes, None if there is none.
    row_bytes: stored bytes of a row. is_view: whether `values` are these bytes, or else new numbers made of them.
    """

    name: str
    shape: Shape
    dtype: str
    ggml_type: GGMLQuantizationType | None
    row_bytes: int
    is_view: bool

    @property
    def n_bytes(self) -> int:
        """Bytes of all rows, without the scales that may lie beside them."""
        return math.prod(self.shape[:-1]) * self.row_bytes


class SourceMetadata(Protocol):
    """What a source says of its model, as GGUF keys. Read once, for all files that are made of it."""

    @property
    def warnings(self) -> Sequence[str]:
        """What could not be kept, for the user."""

    def file_keys(self, shapes: Sequence[tuple[TensorName, Shape]], *, with_mtp: bool) -> list[Key]:
        """The keys of a file with these tensors. with_mtp: whether MTP blocks are among its layers."""


class TensorSource(Protocol):
    """An opened source; a context manager that closes it. Whatever is wrong with it is found when it is opened.

    Rows are counted through all leading dimensions: row r of [n, rows, columns] is row r % rows of expert r // rows.
    The methods that read rows are called from many threads at once and release the GIL while they wait or copy.
    """

    @property
    def path(self) -> Path:
        """The checkpoint's folder, or the GGUF's first file."""

    @property
    def name(self) -> str:
        """The model's name, for files that are made of it."""

    @property
    def title(self) -> str:
        """What a file that is made of it says of where it comes from."""

    @property
    def files(self) -> Sequence[Path]:
        """The files that hold the tensors."""

    @property
    def hparams(self) -> AnyHParams:
        """What the model is, with the MTP blocks that can be used."""

    @property
    def specs(self) -> Sequence[TensorSpec]:
        """The tensors that it has, in llama-quantize's order. A GGUF must say what its layers are: else BadMetadata."""

    @property
    def tensors(self) -> Mapping[str, SourceTensor]:
        """How they are stored, by their names in the source."""

    @property
    def constants(self) -> Mapping[TensorName, bytes]:
        """One-dimensional F32 tensors that a GGUF has and the source does not: computed, by their GGUF names."""

    @property
    def own_types(self) -> Mapping[str, GGMLQuantizationType] | None:
        """The type that each tensor has already, in a GGUF; None of a checkpoint."""

    @property
    def warnings(self) -> Sequence[str]:
        """For the user, whatever is made of it."""

    @property
    def notes(self) -> Sequence[str]:
        """The warnings, and why MTP blocks are left out that should be there."""

    def require_mtp(self) -> None:
        """Raise what is wrong with the MTP blocks, if they are there and cannot be used."""

    def metadata(self, name: str | None, chat_template: Path | None) -> SourceMetadata:
        """What it says of its model; `name` and the file `chat_template` take the place of its own where given."""

    def identity(self) -> dict[str, str]:
        """What tells this source from a changed one: file name -> a digest of size, time and header."""

    def prefetch(self, name: str, start: int, stop: int) -> None:
        """Ask the system to have rows [start, stop) in memory soon."""

    def raw(self, name: str, start: int, stop: int) -> NDArray[np.uint8]:
        """The stored bytes of rows [start, stop), [n, row bytes]."""

    def values(self, name: str, start: int, stop: int) -> Values:
        """Rows [start, stop) as numbers, BF16 and FP8 not widened, [n, columns]."""

    def stop_waiting(self) -> None:
        """Have reads that wait for a network fail at once: what they give is wanted no longer."""

    def close(self) -> None: ...

    def __enter__(self) -> TensorSource: ...

    def __exit__(self, *exc: object) -> None: ...


def rows_per_expert(shape: Shape) -> int:
    """Rows of one expert; of a tensor without experts, all its rows."""
    return shape[-2] if len(shape) > 1 else 1
