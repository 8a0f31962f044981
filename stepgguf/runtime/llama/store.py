"""SequenceStore: sequences that were put away, in RAM under a bound, and on disk if a folder is given.

On disk each is a file (see sequence_file.py) inside a folder named by the digest of what its bytes depend on: the
model file, the library, the cache's types. So another model's files are never looked at.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from stepgguf.errors import EngineError
from stepgguf.runtime.llama.sequence_file import (
    StoredSequence,
    file_name,
    load_sequence,
    load_tokens,
    save_sequence,
)
from stepgguf.runtime.llama.sequences import TokenArray, common_prefix

_LEAST_TOKENS = 64  # a shorter sequence is read anew as fast
_ABANDONED_SECONDS = 3600.0  # after which nobody is writing a .part any more


class SequenceStore:
    """Keeps sequences by their tokens. Above `ram_bytes` those used longest ago go: to the folder, if there is one.

    The folder has a bound of its own; above it the files used longest ago are removed.
    """

    def __init__(self, ram_bytes: int, folder: Path | None, disk_bytes: int, fingerprint: str, n_embd: int) -> None:
        """Find what is in the folder, if there is one. EngineError: it cannot be used.

        fingerprint: what the bytes of a sequence depend on; files of another one are not looked at. n_embd: the width
        of the hidden states that the sequences hold.
        """
        self.ram_bytes, self._disk_bytes, self._n_embd = ram_bytes, disk_bytes, n_embd
        self._in_ram: list[StoredSequence] = []  # least recently used first
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
        """RAM that is taken; what is on disk does not count."""
        return sum(stored.n_bytes for stored in self._in_ram)

    def can_hold(self, n_bytes: int) -> bool:
        """Whether a sequence of this size would be kept at all."""
        return n_bytes <= self.ram_bytes or self._folder is not None

    def put(self, stored: StoredSequence) -> None:
        """Keep a sequence, in the place of those that are its beginning. A short one is not worth it."""
        if len(stored.tokens) < _LEAST_TOKENS:
            return
        self._in_ram = [other for other in self._in_ram if not _covers(stored.tokens, other.tokens)]
        self._in_ram.append(stored)
        self.shrink(0)

    def shrink(self, n_other_bytes: int) -> None:
        """Keep what is here, and so many bytes elsewhere that count too, under the bound of RAM."""
        while self._in_ram and self.n_bytes + n_other_bytes > self.ram_bytes:
            self._to_disk(self._in_ram.pop(0))

    def take_best(self, prompt: TokenArray, n_swa: int, better_than: int) -> StoredSequence | None:
        """Return the sequence that saves the prompt the most reading, if that is more than better_than tokens.

        It is taken out of RAM; a file stays, and counts as used now.
        """
        best = max(self._in_ram, key=lambda stored: stored.n_reusable(prompt, n_swa), default=None)
        n = best.n_reusable(prompt, n_swa) if best else 0
        if (loaded := self._load_best(prompt, max(n, better_than), n_swa)) is not None:
            return loaded
        if best is None or n <= better_than:
            return None
        self._in_ram.remove(best)
        return best

    def _load_best(self, prompt: TokenArray, better_than: int, n_swa: int) -> StoredSequence | None:
        """Load the file that has the most in common with the prompt: it is only read if that may be enough."""
        path = max(self._on_disk, key=lambda p: common_prefix(self._on_disk[p], prompt[:-1]), default=None)
        if path is None or common_prefix(self._on_disk[path], prompt[:-1]) <= better_than:
            return None
        loaded = load_sequence(path, self._n_embd)
        if loaded is None:
            del self._on_disk[path]
            return None
        if loaded.n_reusable(prompt, n_swa) <= better_than:  # the common part is long, but its sliding window is gone
            return None
        with suppress(OSError):
            os.utime(path)
        return loaded

    def close(self) -> None:
        """Write what is in RAM to disk, if there is a folder."""
        for stored in self._in_ram:
            self._to_disk(stored)
        self._in_ram = []

    def _to_disk(self, stored: StoredSequence) -> None:
        """Write a sequence to the folder, if there is one, and remove the files used longest ago above its bound."""
        if self._folder is None:
            return
        path = self._folder / file_name(stored.tokens)
        try:
            save_sequence(path, stored)
        except OSError:  # a full disk costs time later, nothing else
            return
        self._on_disk[path] = stored.tokens.copy()
        total = 0
        for _, size, file in sorted(map(_last_used, self._on_disk), reverse=True):
            total += size
            if total > self._disk_bytes:
                with suppress(OSError):
                    file.unlink()
                del self._on_disk[file]


def _covers(longer: TokenArray, shorter: TokenArray) -> bool:
    return common_prefix(longer, shorter) == len(shorter)


def _last_used(path: Path) -> tuple[float, int, Path]:
    """Return when a file was last used, its size, and the file; 0 and 0 of one that another process has removed."""
    try:
        stat = path.stat()
    except OSError:
        return 0.0, 0, path
    return stat.st_mtime, stat.st_size, path


def _index(folder: Path) -> Iterator[tuple[Path, TokenArray]]:
    """Yield the sequences that earlier processes left, by their tokens; what a killed one left half is cleared away."""
    for part in folder.glob("*.part"):
        if time.time() - _last_used(part)[0] > _ABANDONED_SECONDS:
            part.unlink(missing_ok=True)
    for path in folder.glob("*.npz"):
        if (tokens := load_tokens(path)) is not None:
            yield path, tokens
