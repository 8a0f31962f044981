"""A file that is read at a place, wherever it lies.

LocalFile                  on this disk
remote_file.RemoteFile     on the Hub, by ranges over HTTP
kept_file.KeptFile         a file of the Hub that is written to the disk as it is read
read_ahead.BufferedFile    one of these two, with what is read soon read in the background
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

from stepgguf.errors import CheckpointError, CorruptShard, MissingShard, StepggufError, TruncatedShard
from stepgguf.files import disk

AGAIN = "Download the shard again."


class RandomAccessFile(Protocol):
    """An opened file. It is read from many threads at once, which release the GIL while they wait."""

    @property
    def path(self) -> Path:
        """What messages call it."""

    @property
    def size(self) -> int:
        """Its bytes."""

    @property
    def version(self) -> str:
        """What changes when its content does."""

    def read_at(self, into: bytearray | memoryview, offset: int, name: str) -> None:
        """Fill a buffer with the bytes at `offset`. CheckpointError, which names what was to be read, if that fails."""

    def prefetch_at(self, size: int, offset: int) -> None:
        """Have these bytes at hand soon, if that can be."""

    def close(self) -> None: ...


class LocalFile:
    """A file on this disk. MissingShard, CorruptShard or CheckpointError if there is none that can be read.

    version: what tells it from a changed one; by default its size and time. stored_at: where it lies, if messages call
    it otherwise. truncated: the error for one that ends early.
    """

    def __init__(
        self,
        path: Path,
        version: str | None = None,
        *,
        stored_at: Path | None = None,
        truncated: type[StepggufError] = TruncatedShard,
    ) -> None:
        self.path, self._truncated = path, truncated
        stored_at = stored_at or path
        try:
            self._file = disk.open_regular(stored_at)
        except disk.NotAFile as error:
            raise CorruptShard(f"{path}: not a file", hint=AGAIN) from error
        except PermissionError as error:  # safetensors makes files that only their owner may read
            raise CheckpointError(f"{path}: {error.strerror}", hint="Check its permissions.") from error
        except OSError as error:
            broken = stored_at.is_symlink() and not stored_at.exists()
            problem = "a link to a file that is not there" if broken else error.strerror
            raise MissingShard(f"{path}: {problem}", hint=AGAIN) from error
        status = os.fstat(self._file.fileno())
        self.size, self.version = status.st_size, version or f"{status.st_size} {status.st_mtime_ns}"

    def read_at(self, into: bytearray | memoryview, offset: int, name: str) -> None:
        disk.read_at(self._file.fileno(), into, offset, name, self._truncated)

    def prefetch_at(self, size: int, offset: int) -> None:
        disk.prefetch_at(self._file.fileno(), size, offset)

    def close(self) -> None:
        self._file.close()
