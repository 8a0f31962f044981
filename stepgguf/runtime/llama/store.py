"""Idle sequences out of the context: in RAM under a bound, and on disk if a folder is given.

On disk an entry is a numpy .npz (a zip, so every array has a CRC) named by the digest of its tokens, inside a folder
named by the digest of what its bytes depend on: the model file, the library, the cache's types. It holds what was
said, as token ids: files are readable by their owner only. Nothing is unpickled. A file is written beside its place,
synced and renamed; one that is damaged all the same is removed, with a line in the log, and costs nothing but time.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from stepgguf.errors import EngineError
from stepgguf.runtime.llama.mtp import DraftState
from stepgguf.runtime.llama.prefix import Checkpoint, TokenArray, common_prefix, latest

T = TypeVar("T")
log = logging.getLogger(__name__)
_LEAST_TOKENS = 64  # shorter ones are read anew as fast
_ABANDONED = 3600.0  # seconds after which nobody is writing a .part any more


@dataclass(eq=False)
class Entry:
    """A sequence that was put away: its tokens, all its cells, its checkpoints. `oldest`: see Context.oldest."""

    tokens: TokenArray
    cells: bytearray
    draft: DraftState | None
    checkpoints: list[Checkpoint]
    oldest: int

    @property
    def n_bytes(self) -> int:
        draft = self.draft.n_bytes if self.draft else 0
        return len(self.cells) + draft + self.tokens.nbytes + sum(c.n_bytes for c in self.checkpoints)

    def usable(self, prompt: TokenArray, n_swa: int) -> int:
        """How many tokens of the prompt it would save."""
        n = common_prefix(self.tokens, prompt[:-1])
        if self.oldest <= max(0, n - n_swa):
            return n
        checkpoint = latest(self.checkpoints, n)
        return checkpoint.n if checkpoint else 0


class Store:
    """Least recently used entries go first. With a folder they go to disk instead, under a bound of its own."""

    def __init__(self, ram_bytes: int, folder: Path | None, disk_bytes: int, fingerprint: str, n_embd: int) -> None:
        """EngineError: the folder cannot be used. n_embd: of the hidden states that the entries hold."""
        self.ram_bytes, self._disk_bytes, self._n_embd = ram_bytes, disk_bytes, n_embd
        self._entries: list[Entry] = []  # least recently used first
        self._folder: Path | None = None
        self._on_disk: dict[Path, TokenArray] = {}
        if folder is not None:
            self._folder = folder / hashlib.sha256(fingerprint.encode()).hexdigest()[:16]
            try:
                self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                self._on_disk = dict(_index(self._folder))
            except OSError as error:
                raise EngineError(
                    f"conversations cannot be kept in {folder}: {error.strerror or error}",
                    hint="Give --cache-folder a folder that you may write to.",
                ) from error

    @property
    def n_bytes(self) -> int:
        return sum(entry.n_bytes for entry in self._entries)

    def has_room(self, n_bytes: int) -> bool:
        return n_bytes <= self.ram_bytes or self._folder is not None

    def put(self, entry: Entry) -> None:
        if len(entry.tokens) < _LEAST_TOKENS:
            return
        self._entries = [e for e in self._entries if not _covers(entry.tokens, e.tokens)]
        self._entries.append(entry)
        self.shrink(0)

    def shrink(self, n_others: int) -> None:
        """Keep what is here and n_others bytes elsewhere under the bound."""
        while self._entries and self.n_bytes + n_others > self.ram_bytes:
            self._to_disk(self._entries.pop(0))

    def best(self, prompt: TokenArray, n_swa: int, better_than: int) -> Entry | None:
        """The entry that saves the most, if that is more than better_than tokens. It is taken out of RAM."""
        entry = max(self._entries, key=lambda e: e.usable(prompt, n_swa), default=None)
        n = entry.usable(prompt, n_swa) if entry else 0
        path = max(self._on_disk, key=lambda p: common_prefix(self._on_disk[p], prompt[:-1]), default=None)
        if path is not None and common_prefix(self._on_disk[path], prompt[:-1]) > max(n, better_than):
            loaded = _load(path, self._n_embd)
            if loaded is None:
                del self._on_disk[path]
            elif loaded.usable(prompt, n_swa) > max(n, better_than):
                with suppress(OSError):
                    os.utime(path)
                return loaded
        if entry is None or n <= better_than:
            return None
        self._entries.remove(entry)
        return entry

    def close(self) -> None:
        """Write what is in RAM to disk, if there is a folder."""
        for entry in self._entries:
            self._to_disk(entry)
        self._entries = []

    def _to_disk(self, entry: Entry) -> None:
        if self._folder is None:
            return
        path = self._folder / _file_name(entry.tokens)
        try:
            _save(path, entry)
        except OSError:  # a full disk costs time later, nothing else
            return
        self._on_disk[path] = entry.tokens.copy()
        total = 0
        for _, size, file in sorted(map(_age, self._on_disk), reverse=True):
            total += size
            if total > self._disk_bytes:
                with suppress(OSError):
                    file.unlink()
                del self._on_disk[file]


def _covers(longer: TokenArray, shorter: TokenArray) -> bool:
    return common_prefix(longer, shorter) == len(shorter)


def _age(path: Path) -> tuple[float, int, Path]:
    """When it was last used, and its size; of one that another process has removed 0."""
    try:
        stat = path.stat()
    except OSError:
        return 0.0, 0, path
    return stat.st_mtime, stat.st_size, path


def _index(folder: Path) -> Iterator[tuple[Path, TokenArray]]:
    for part in folder.glob("*.part"):
        if time.time() - _age(part)[0] > _ABANDONED:
            part.unlink(missing_ok=True)
    for path in folder.glob("*.npz"):
        if (tokens := _read(path, _Arrays.tokens)) is not None:
            yield path, tokens


def _save(path: Path, entry: Entry) -> None:
    arrays: dict[str, Any] = {
        "tokens": entry.tokens,
        "cells": np.frombuffer(entry.cells, np.uint8),
        "oldest": np.array(entry.oldest),
        "n_arrays": np.array(0),
    }
    for key, draft in (("draft", entry.draft), *((f"{i}", c.draft) for i, c in enumerate(entry.checkpoints))):
        if draft is not None:
            cells = np.frombuffer(draft.cells, np.uint8)
            arrays |= {f"{key}.n": np.array(draft.n), f"{key}.cells": cells, f"{key}.hidden": draft.hidden}
    for i, checkpoint in enumerate(entry.checkpoints):
        arrays |= {f"{i}": np.array(checkpoint.n), f"{i}.window": np.frombuffer(checkpoint.window, np.uint8)}
    arrays["n_arrays"] = np.array(len(arrays))
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


def _load(path: Path, n_embd: int) -> Entry | None:
    """None if the file is gone or damaged."""
    return _read(path, lambda arrays: arrays.entry(n_embd))


def _read(path: Path, take: Callable[[_Arrays], T]) -> T | None:
    """None of a file that cannot be read, or is damaged: that one is removed."""
    try:
        if not path.is_file():
            raise OSError("it is not a file")
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return take(_Arrays(path, arrays))
    except OSError as error:
        log.warning("%s cannot be read: %s", path, error.strerror or error)
    except Exception as error:  # noqa: BLE001  numpy, zipfile and zlib raise what comes to hand: EOFError, MemoryError
        log.warning("%s is damaged and was removed: %s", path, error)
        with suppress(OSError):
            path.unlink()
    return None


class _Arrays:
    """The arrays of a file. ValueError, or what numpy makes of it, for those that cannot be an entry's."""

    def __init__(self, path: Path, file: Any) -> None:
        self._path, self._file = path, file
        self.names: list[str] = file.files
        self._taken: set[str] = set()

    def entry(self, n_embd: int) -> Entry:
        tokens = self.tokens()
        checkpoints = [
            Checkpoint(self.number(f"{i}", len(tokens)), self.bytes(f"{i}.window"), self.draft(f"{i}", n_embd))
            for i in range(sum(name.isdecimal() for name in self.names))
        ]
        cells, draft = self.bytes("cells"), self.draft("draft", n_embd)
        oldest = self.number("oldest", len(tokens))
        if not self.number("n_arrays", len(self.names)) == len(self.names) == len(self._taken):
            raise ValueError("arrays are missing")  # a part of the zip's directory may be lost, and no CRC covers that
        return Entry(tokens, cells, draft, checkpoints, oldest)

    def tokens(self) -> TokenArray:
        """They are what the file is named by."""
        tokens: TokenArray = self._array("tokens", np.int32, 1)
        if _file_name(tokens) != self._path.name:
            raise ValueError("the tokens are not those that it is named by")
        return tokens

    def number(self, name: str, most: int) -> int:
        value = int(self._array(name, np.int64, 0))
        if not 0 <= value <= most:
            raise ValueError(f"{name} is {value}, expected at most {most}")
        return value

    def bytes(self, name: str) -> bytearray:
        return bytearray(self._array(name, np.uint8, 1))

    def draft(self, name: str, n_embd: int) -> DraftState | None:
        if f"{name}.n" not in self.names:
            return None
        hidden = self._array(f"{name}.hidden", np.float32, 1)
        if len(hidden) != n_embd:
            raise ValueError(f"{name}.hidden has {len(hidden)} values, expected {n_embd}")
        return DraftState(self.number(f"{name}.n", np.iinfo(np.int32).max), self.bytes(f"{name}.cells"), hidden)

    def _array(self, name: str, dtype: Any, n_dims: int) -> Any:
        self._taken.add(name)
        array = self._file[name]
        if not isinstance(array, np.ndarray) or array.dtype != dtype or array.ndim != n_dims:
            raise ValueError(f"{name} is no {np.dtype(dtype)} of {n_dims} dimensions")
        return array


def _file_name(tokens: TokenArray) -> str:
    return f"{hashlib.sha256(tokens.tobytes()).hexdigest()[:32]}.npz"
