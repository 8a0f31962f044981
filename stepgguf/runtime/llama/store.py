"""Idle sequences out of the context: in RAM under a bound, and on disk if a folder is given.

On disk an entry is a numpy .npz (a zip, so every array has a CRC) named by the digest of its tokens, inside a folder
named by the digest of what its bytes depend on: the model file, the library, the cache's types. It holds what was
said, as token ids: files are readable by their owner only. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stepgguf.runtime.llama.mtp import DraftState
from stepgguf.runtime.llama.prefix import Checkpoint, TokenArray, common_prefix, latest

_LEAST_TOKENS = 64  # shorter ones are read anew as fast


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

    def __init__(self, ram_bytes: int, folder: Path | None, disk_bytes: int, fingerprint: str) -> None:
        self.ram_bytes, self._disk_bytes = ram_bytes, disk_bytes
        self._entries: list[Entry] = []  # least recently used first
        self._folder: Path | None = None
        self._on_disk: dict[Path, TokenArray] = {}
        if folder is not None:
            self._folder = folder / hashlib.sha256(fingerprint.encode()).hexdigest()[:16]
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._on_disk = dict(_index(self._folder))

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
            loaded = _load(path)
            if loaded is None:
                del self._on_disk[path]
            elif loaded.usable(prompt, n_swa) > max(n, better_than):
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
        path = self._folder / f"{hashlib.sha256(entry.tokens.tobytes()).hexdigest()[:32]}.npz"
        try:
            _save(path, entry)
        except OSError:  # a full disk costs time later, nothing else
            return
        self._on_disk[path] = entry.tokens.copy()
        files = sorted(((p.stat().st_mtime, p.stat().st_size, p) for p in self._on_disk if p.exists()), reverse=True)
        total = 0
        for _, size, file in files:
            total += size
            if total > self._disk_bytes:
                file.unlink(missing_ok=True)
                del self._on_disk[file]


def _covers(longer: TokenArray, shorter: TokenArray) -> bool:
    return common_prefix(longer, shorter) == len(shorter)


def _index(folder: Path) -> Iterator[tuple[Path, TokenArray]]:
    for path in folder.glob("*.npz"):
        try:
            with np.load(path, allow_pickle=False) as file:
                yield path, file["tokens"]
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            path.unlink(missing_ok=True)  # cut off by a crash


def _save(path: Path, entry: Entry) -> None:
    arrays: dict[str, Any] = {
        "tokens": entry.tokens,
        "cells": np.frombuffer(entry.cells, np.uint8),
        "oldest": np.array(entry.oldest),
    }
    for key, draft in (("draft", entry.draft), *((f"{i}", c.draft) for i, c in enumerate(entry.checkpoints))):
        if draft is not None:
            cells = np.frombuffer(draft.cells, np.uint8)
            arrays |= {f"{key}.n": np.array(draft.n), f"{key}.cells": cells, f"{key}.hidden": draft.hidden}
    for i, checkpoint in enumerate(entry.checkpoints):
        arrays |= {f"{i}": np.array(checkpoint.n), f"{i}.window": np.frombuffer(checkpoint.window, np.uint8)}
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")  # mode 0600
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        os.replace(name, path)
    except OSError:
        Path(name).unlink(missing_ok=True)
        raise


def _load(path: Path) -> Entry | None:
    """None if the file is gone or damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:

            def draft(key: str) -> DraftState | None:
                if f"{key}.n" not in file:
                    return None
                return DraftState(int(file[f"{key}.n"]), bytearray(file[f"{key}.cells"]), file[f"{key}.hidden"])

            count = sum(1 for name in file.files if name.isdecimal())
            checkpoints = [
                Checkpoint(int(file[f"{i}"]), bytearray(file[f"{i}.window"]), draft(f"{i}")) for i in range(count)
            ]
            return Entry(file["tokens"], bytearray(file["cells"]), draft("draft"), checkpoints, int(file["oldest"]))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        path.unlink(missing_ok=True)
        return None
