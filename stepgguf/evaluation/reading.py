"""Reading the heads of reference files, which may be cut off, damaged or no such file at all."""

from __future__ import annotations

import os
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from stepgguf.errors import EvaluationError

_AGAIN = "Make it again, with `stepgguf eval ... --base FILE` or llama-perplexity."


def read_exactly(file: BinaryIO, n: int) -> bytes:
    """Read n bytes. EvaluationError if the file has fewer, before memory is taken for them."""
    left = os.fstat(file.fileno()).st_size - file.tell()
    if n < 0 or n > left:
        raise refuse_truncated(file, file.tell() + n)
    return file.read(n)


def read_numbers(file: BinaryIO, n: int) -> npt.NDArray[np.int32]:
    """Read n int32."""
    return np.frombuffer(read_exactly(file, 4 * n), "<i4").astype(np.int32)


def read_tokens(file: BinaryIO, n: int, n_vocab: int) -> npt.NDArray[np.int32]:
    """Read n token ids. EvaluationError if one is not in the vocabulary."""
    tokens = read_numbers(file, n)
    if tokens.min() < 0 or tokens.max() >= n_vocab:
        wrong = tokens[(tokens < 0) | (tokens >= n_vocab)][0]
        raise refuse_damaged(file, f"token {wrong} in a vocabulary of {n_vocab}")
    return tokens


def refuse_truncated(file: BinaryIO, expected: int) -> EvaluationError:
    """Return the error of a file that ends before `expected` bytes."""
    found = os.fstat(file.fileno()).st_size
    return EvaluationError(f"{file.name}: truncated, {found:,} bytes, expected {expected:,}", hint=_AGAIN)


def refuse_damaged(file: BinaryIO, found: str) -> EvaluationError:
    """Return the error of a file that says what cannot be."""
    return EvaluationError(f"{file.name}: no reference that can be read: it says {found}", hint=_AGAIN)
