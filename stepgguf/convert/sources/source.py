"""Where tensors come from: the protocol that a safetensors checkpoint and a GGUF file both fulfil."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from stepgguf.quants.values import Values


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """A tensor as the source stores it. `ggml_type` is the GGUF type with the same bytes, None for scaled FP8."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    ggml_type: GGMLQuantizationType | None


class TensorSource(Protocol):
    """Rows are counted through all leading dimensions: row r of [n, rows, columns] is row r % rows of expert r // rows.

    Methods are called from many threads at once and release the GIL while they wait or copy.
    """

    @property
    def path(self) -> Path: ...

    @property
    def tensors(self) -> dict[str, SourceTensor]: ...

    def identity(self) -> dict[str, str]:
        """What tells this source from a changed one: file name -> a digest of size, time and header."""

    def prefetch(self, name: str, start: int, stop: int) -> None:
        """Ask the system to have rows [start, stop) in memory soon."""

    def raw(self, name: str, start: int, stop: int) -> NDArray[np.uint8]:
        """The stored bytes of rows [start, stop), [n, row bytes]."""

    def values(self, name: str, start: int, stop: int) -> Values:
        """Rows [start, stop) as numbers, BF16 and FP8 not widened, [n, columns]."""
