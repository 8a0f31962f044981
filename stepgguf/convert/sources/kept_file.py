"""A file of the Hub that is written to the disk as it is read, so that each of its bytes is fetched once.

    NAME.part    the data, sparse and of full size: what is fetched lies at its place
                 SHA-256 of the version that it is of, 32 bytes
                 a byte for each piece of a MiB: 1 where it is there
    NAME         the file, once it is whole and its digest is the one that the Hub lists

Pieces are marked after their data has reached the disk. A mark is never taken back, so whatever a power cut leaves of
the marks is true; a piece whose mark is lost is fetched again.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from threading import Condition, Lock

from stepgguf.convert.sources.listed_file import ListedFile
from stepgguf.convert.sources.random_access import RandomAccessFile
from stepgguf.errors import OutputError, TruncatedShard
from stepgguf.files import disk

PIECE = 2**20  # bytes
COMMIT_SECONDS = 2.0
_RUN = 16  # pieces that are fetched at a time, at most
_LABEL_BYTES = 32


class KeptFile:
    """A RandomAccessFile over another one, `file`, which is read only where the .part of `stored` has a gap.

    OutputError if the .part is another process's, or of another version.
    """

    def __init__(self, file: RandomAccessFile, listed: ListedFile, stored: Path) -> None:
        self.path, self.size, self.version = file.path, listed.size, listed.version
        self._file, self._listed, self._stored = file, listed, stored
        self.part = stored.with_name(f"{stored.name}.part")
        self._changed, self._committing = Condition(), Lock()
        self._coming: set[int] = set()  # pieces that a thread is fetching
        self._last_commit = time.monotonic()
        with disk.disk_errors(self.part):
            try:
                self._fd = disk.hold(self.part, make=True)
            except BlockingIOError:
                raise OutputError(
                    f"{self.part} is in use: another stepgguf keeps it", hint="Wait for it to end, or keep elsewhere."
                ) from None
            try:
                self._there = self._open_marks()
            except BaseException:
                os.close(self._fd)
                raise

    def read_at(self, into: bytearray | memoryview, offset: int, name: str) -> None:
        """What RemoteFile raises; OutputError where the disk takes no more."""
        view = memoryview(into).cast("B")
        if view:
            self._require(range(offset // PIECE, (offset + len(view) - 1) // PIECE + 1), name)
            disk.read_at(self._fd, view, offset, name, TruncatedShard)

    def prefetch_at(self, size: int, offset: int) -> None:
        """Nothing: read_ahead.BufferedFile does it."""

    def close(self) -> None:
        """Nothing: what is read ahead may still be written; see `release`."""

    @property
    def missing_bytes(self) -> int:
        """How many bytes are still to be fetched."""
        return sum(self._extent(run)[1] for run in _runs(self._missing(), 1))

    def missing_runs(self) -> list[range]:
        """The pieces that are still to be fetched, a few together."""
        return list(_runs(self._missing(), _RUN))

    def fetch(self, pieces: range) -> int:
        """Have these pieces on the disk; their bytes."""
        self._require(pieces, "not read by the conversion")
        return self._extent(pieces)[1]

    def finish(self) -> None:
        """Make the .part, of which nothing is missing, the file alone: without its marks, and on the disk."""
        with disk.disk_errors(self.part):
            self.commit()
            os.ftruncate(self._fd, self.size)
            os.fsync(self._fd)

    def commit(self) -> None:
        """Have what is fetched on the disk, then mark it."""
        with self._committing:
            self._last_commit = time.monotonic()
            marks = bytes(self._there)
            disk.sync_data(self._fd)
            disk.write_at(self._fd, marks, self.size + _LABEL_BYTES)

    def release(self) -> None:
        """Mark what is there, and let go of it. Nothing may read it any longer."""
        try:
            if os.fstat(self._fd).st_size > self.size:  # not finished
                self.commit()
        finally:
            os.close(self._fd)
            self._file.close()

    def _open_marks(self) -> bytearray:
        """The marks of the pieces that an earlier run left; a new .part is made where there is none."""
        n_pieces, label = -(-self.size // PIECE), hashlib.sha256(self.version.encode()).digest()
        full_size, found_size = self.size + _LABEL_BYTES + n_pieces, os.fstat(self._fd).st_size
        if found_size == self.size:  # `finish` came to its end, and what was to follow did not
            return bytearray(b"\1" * n_pieces)
        if found_size not in (0, full_size):
            raise self._of_another_version()
        os.ftruncate(self._fd, full_size)
        trailer = bytearray(_LABEL_BYTES + n_pieces)
        disk.read_at(self._fd, trailer, self.size, str(self.part), OutputError)
        found, marks = trailer[:_LABEL_BYTES], trailer[_LABEL_BYTES:]
        if found != label and any(found):
            raise self._of_another_version()
        disk.write_at(self._fd, label, self.size)
        os.fsync(self._fd)
        return marks if found == label else bytearray(n_pieces)

    def _of_another_version(self) -> OutputError:
        return OutputError(
            f"{self.part} is of another version of {self._listed.path} than {self.path}",
            hint="Keep this one in another folder, or remove that file.",
        )

    def _require(self, pieces: range, name: str) -> None:
        """Have these pieces on the disk: fetch those that nobody is fetching, then wait for the others."""
        while True:
            with self._changed:
                missing = [piece for piece in pieces if not self._there[piece]]
                if not missing:
                    return
                mine = [piece for piece in missing if piece not in self._coming]
                if not mine:
                    self._changed.wait()
                    continue
                self._coming.update(mine)
            try:
                for run in _runs(mine, _RUN):
                    self._fetch_run(run, name)
            finally:
                with self._changed:
                    self._coming.difference_update(mine)
                    self._changed.notify_all()

    def _fetch_run(self, pieces: range, name: str) -> None:
        offset, n = self._extent(pieces)
        data = bytearray(n)
        self._file.read_at(data, offset, name)
        with disk.disk_errors(self.part):
            disk.write_at(self._fd, memoryview(data), offset)
            self._there[pieces.start : pieces.stop] = b"\1" * len(pieces)
            if time.monotonic() - self._last_commit > COMMIT_SECONDS:
                self.commit()

    def _extent(self, pieces: range) -> tuple[int, int]:
        """Where pieces lie: the offset, their bytes."""
        start = pieces.start * PIECE
        return start, min(pieces.stop * PIECE, self.size) - start

    def _missing(self) -> Iterator[int]:
        return (piece for piece, there in enumerate(self._there) if not there)


def _runs(pieces: Iterable[int], most: int) -> Iterator[range]:
    """Ascending numbers as runs of neighbours, at most so many in one."""
    start = stop = -1
    for piece in pieces:
        if piece != stop or stop - start == most:
            if stop > start:
                yield range(start, stop)
            start = piece
        stop = piece + 1
    if stop > start:
        yield range(start, stop)
