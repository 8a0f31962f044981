"""An importance matrix as a conversion uses it: the rows of each tensor's experts, computed when they are needed."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepgguf.model.names import TensorName
from stepgguf.quants import ImatrixPrior
from stepgguf.quants.imatrix import Imatrix, ImatrixEntry, channel_importance, read_imatrix

_KEPT = 16  # tensors whose rows are kept: 5 MB each at real size, and units come in file order

Shape = tuple[int, ...]


class Importance:
    """`source` with a prior for experts that calibration hardly saw. Thread-safe.

    shape: the tensor's, in numpy order. ImatrixError if the matrix has another one for it.
    """

    def __init__(self, source: Imatrix, prior: ImatrixPrior = "pooled") -> None:
        assert source.path is not None
        self.source, self.prior, self.path = source, prior, source.path
        self._rows = lru_cache(_KEPT)(self._compute)

    @classmethod
    def read(cls, path: Path, prior: ImatrixPrior = "pooled") -> Importance:
        """Read the file of an importance matrix. ImatrixError if it is none."""
        return cls(read_imatrix(path), prior)

    def has(self, name: str, shape: Shape) -> bool:
        """Whether calibration saw the tensor."""
        return self._entry(name, shape) is not None

    def rows(self, name: str, shape: Shape) -> NDArray[np.float32] | None:
        """E[x^2] of each expert's input channels, [n_expert, columns]; of a dense tensor [1, columns].

        None without data: then all channels count alike.
        """
        return self._rows(name, shape)

    def expert_row(self, name: str, shape: Shape, expert: int) -> NDArray[np.float32] | None:
        """E[x^2] of one expert's input channels, [columns]; None without data."""
        rows = self.rows(name, shape)
        return None if rows is None else rows[expert if len(rows) > 1 else 0]

    def counts(self, name: str, shape: Shape) -> NDArray[np.float32] | None:
        """Calibration tokens that each expert saw, [n_expert]. None if the file does not say it."""
        entry = self._entry(name, shape)
        return entry.counts if entry is not None and entry.counted else None

    def identity(self) -> str:
        """A digest of the prior and of the file's name, size and time, to tell this from other importance."""
        status = self.path.stat()
        mark = f"{self.prior} {self.path.name} {status.st_size} {status.st_mtime_ns}"
        return hashlib.sha256(mark.encode()).hexdigest()

    def manifest_field(self) -> dict[str, Any]:
        """Where the importance came from, as the manifest says it."""
        return {"file": self.path.name, "prior": self.prior, "datasets": list(self.source.datasets)}

    def _entry(self, name: str, shape: Shape) -> ImatrixEntry | None:
        return self.source.entry_of(TensorName(name), shape)

    def _compute(self, name: str, shape: Shape) -> NDArray[np.float32] | None:
        entry = self._entry(name, shape)
        return None if entry is None else channel_importance(entry, self.prior)
