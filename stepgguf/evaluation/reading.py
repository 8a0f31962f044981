"""Reading the heads of reference files, which may be cut off, damaged or no such file at all."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from stepgguf.errors import EvaluationError

MOST_TOKENS = 2**22  # of a vocabulary that is believed
_AGAIN = "Make it again, with `stepgguf eval ... --base FILE` or llama-perplexity."


@dataclass(frozen=True, eq=False, slots=True)
class HeadReader:
    """Reads from an open file; what it finds wrong is an EvaluationError that names the path."""

    file: BinaryIO
    path: Path

    @property
    def size(self) -> int:
        """The bytes of the file."""
        return os.fstat(self.file.fileno()).st_size

    def take(self, n: int) -> bytes:
        """Read n bytes. If the file has fewer, that is said before memory is taken for them."""
        end = self.file.tell() + n
        if n < 0:
            raise self.damaged(f"a length of {n} bytes")
        if end > self.size:
            raise self.truncated(end)
        return self.file.read(n)

    def numbers(self, n: int) -> npt.NDArray[np.int32]:
        """Read n int32."""
        return np.frombuffer(self.take(4 * n), "<i4").astype(np.int32)

    def tokens(self, n: int, n_vocab: int) -> npt.NDArray[np.int32]:
        """Read n token ids of a vocabulary."""
        tokens = self.numbers(n)
        wrong = tokens[(tokens < 0) | (tokens >= n_vocab)]
        if len(wrong):
            raise self.damaged(f"token {wrong[0]} in a vocabulary of {n_vocab}")
        return tokens

    def truncated(self, expected: int) -> EvaluationError:
        """Return the error of a file that ends before `expected` bytes."""
        return EvaluationError(f"{self.path}: truncated, {self.size:,} bytes, expected {expected:,}", hint=_AGAIN)

    def damaged(self, found: str) -> EvaluationError:
        """Return the error of a file that says what cannot be."""
        return EvaluationError(f"{self.path}: no reference that can be read: it says {found}", hint=_AGAIN)
