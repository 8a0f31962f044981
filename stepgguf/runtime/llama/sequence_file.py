"""A sequence that was put away, and its file.

The file is a numpy .npz: a zip, so every array has a CRC. It is named by the digest of its tokens and readable by its
owner only, for it holds what was said. Nothing is unpickled. It is written beside its place, synced and renamed; one
that is damaged all the same is removed, with a line in the log, and costs nothing but time.

    tokens, cells, oldest     as in StoredSequence                          n_arrays   how many arrays the file has
    draft.{n,cells,hidden}    the MTP blocks' state at the end, if they draft
    0, 0.window               the first saved state: n_tokens, and the cells of the sliding window
    0.{n,cells,hidden}        the MTP blocks' state there; then 1, 1.window and so on
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from numpy.lib.npyio import NpzFile

from stepgguf.runtime.llama.mtp import DraftState
from stepgguf.runtime.llama.sequences import SavedState, TokenArray, common_prefix, latest_state

Taken = TypeVar("Taken")
log = logging.getLogger(__name__)


@dataclass(eq=False)
class StoredSequence:
    """A sequence that was put away.

    cells: of all layers, as LlamaContext.save gives them. oldest: the first position of the sliding window in them.
    """

    tokens: TokenArray
    cells: bytearray
    draft: DraftState | None
    saved_states: list[SavedState]
    oldest: int

    @property
    def n_bytes(self) -> int:
        draft = self.draft.n_bytes if self.draft else 0
        return len(self.cells) + draft + self.tokens.nbytes + sum(state.n_bytes for state in self.saved_states)

    def n_reusable(self, prompt: TokenArray, n_swa: int) -> int:
        """Return how many tokens of the prompt need not be read if it is brought back."""
        n = common_prefix(self.tokens, prompt[:-1])
        if self.oldest <= max(0, n - n_swa):
            return n
        state = latest_state(self.saved_states, n)
        return state.n_tokens if state else 0


def _arrays_of(stored: StoredSequence) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays of a file: see this module's docstring."""
    arrays: dict[str, npt.NDArray[Any]] = {
        "tokens": stored.tokens,
        "cells": np.frombuffer(stored.cells, np.uint8),
        "oldest": np.array(stored.oldest),
        "n_arrays": np.array(0),
    }
    drafts = [("draft", stored.draft), *((f"{i}", state.draft) for i, state in enumerate(stored.saved_states))]
    for key, draft in drafts:
        if draft is not None:
            cells = np.frombuffer(draft.cells, np.uint8)
            arrays |= {f"{key}.n": np.array(draft.n_tokens), f"{key}.cells": cells, f"{key}.hidden": draft.hidden}
    for i, state in enumerate(stored.saved_states):
        sliding_window = np.frombuffer(state.sliding_window, np.uint8)
        arrays |= {f"{i}": np.array(state.n_tokens), f"{i}.window": sliding_window}
    arrays["n_arrays"] = np.array(len(arrays))  # itself included
    return arrays


def save_sequence(path: Path, stored: StoredSequence) -> None:
    """Write a file whole or not at all. OSError says why not."""
    arrays: dict[str, Any] = _arrays_of(stored)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")  # mode 0600
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except OSError:
        Path(name).unlink(missing_ok=True)
        raise


def load_sequence(path: Path, n_embd: int) -> StoredSequence | None:
    """Return the sequence of a file. None if it cannot be read, or is damaged: then it is removed.

    n_embd: the width that its hidden states must have.
    """
    return _read(path, lambda arrays: arrays.sequence(n_embd))


def load_tokens(path: Path) -> TokenArray | None:
    """Return the tokens alone of a file. None if it cannot be read, or is damaged: then it is removed."""
    return _read(path, _StoredArrays.tokens)


def _read(path: Path, take: Callable[[_StoredArrays], Taken]) -> Taken | None:
    try:
        if not path.is_file():
            raise OSError("it is not a file")
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return take(_StoredArrays(path, arrays))
    except OSError as error:
        log.warning("%s cannot be read: %s", path, error.strerror or error)
    except Exception as error:  # noqa: BLE001  numpy, zipfile and zlib raise what comes to hand: EOFError, MemoryError
        log.warning("%s is damaged and was removed: %s", path, error)
        with suppress(OSError):
            path.unlink()
    return None


class _StoredArrays:
    """The arrays of a file, checked as they are taken. ValueError, or what numpy makes of it, for those that cannot be
    a sequence's."""

    def __init__(self, path: Path, file: NpzFile) -> None:
        self._path, self._file = path, file
        self.names: list[str] = file.files
        self._taken: set[str] = set()

    def sequence(self, n_embd: int) -> StoredSequence:
        """Return the sequence, if all arrays are there and are of the types, shapes and ranges that they must be of."""
        tokens = self.tokens()
        saved_states = [
            SavedState(self.number(f"{i}", len(tokens)), self.bytes(f"{i}.window"), self.draft(f"{i}", n_embd))
            for i in range(sum(name.isdecimal() for name in self.names))
        ]
        cells, draft = self.bytes("cells"), self.draft("draft", n_embd)
        oldest = self.number("oldest", len(tokens))
        if not self.number("n_arrays", len(self.names)) == len(self.names) == len(self._taken):
            raise ValueError("arrays are missing")  # a part of the zip's directory may be lost, and no CRC covers that
        return StoredSequence(tokens, cells, draft, saved_states, oldest)

    def tokens(self) -> TokenArray:
        """Return the tokens, which the file must be named by."""
        tokens: TokenArray = self._array("tokens", np.int32, 1)
        if file_name(tokens) != self._path.name:
            raise ValueError("the tokens are not those that it is named by")
        return tokens

    def number(self, name: str, most: int) -> int:
        """Return an array that is one number, 0 to `most`."""
        value = int(self._array(name, np.int64, 0))
        if not 0 <= value <= most:
            raise ValueError(f"{name} is {value}, expected at most {most}")
        return value

    def bytes(self, name: str) -> bytearray:
        """Return an array of bytes, of any length."""
        return bytearray(self._array(name, np.uint8, 1))

    def draft(self, name: str, n_embd: int) -> DraftState | None:
        """Return the three arrays of a DraftState. None if the file has none of this name."""
        if f"{name}.n" not in self.names:
            return None
        hidden = self._array(f"{name}.hidden", np.float32, 1)
        if len(hidden) != n_embd:
            raise ValueError(f"{name}.hidden has {len(hidden)} values, expected {n_embd}")
        return DraftState(self.number(f"{name}.n", np.iinfo(np.int32).max), self.bytes(f"{name}.cells"), hidden)

    def _array(self, name: str, dtype: npt.DTypeLike, n_dims: int) -> npt.NDArray[Any]:
        self._taken.add(name)
        array = self._file[name]
        if not isinstance(array, np.ndarray) or array.dtype != dtype or array.ndim != n_dims:
            raise ValueError(f"{name} is no {np.dtype(dtype)} of {n_dims} dimensions")
        return array


def file_name(tokens: TokenArray) -> str:
    """Return what the file of a sequence with these tokens is called."""
    return f"{hashlib.sha256(tokens.tobytes()).hexdigest()[:32]}.npz"
