"""The journal of a conversion: what is being made, and which units of it are on the disk.

    line 1      JSON: what must be the same for a run to be resumed
    then        64 bytes for each finished unit: number u32, crc32 of number and the rest u32, sha256 of the unit's
                bytes, its codec.Loss 3 x f64 (NaN where nothing was encoded)

A unit is entered after its bytes have reached the disk, so neither kill -9 nor a power cut leaves an entry without its
bytes. A journal is held while it is open (disk.hold): of two processes that make the same files one gets it.
"""

from __future__ import annotations

import json
import math
import os
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepgguf.errors import OutputError
from stepgguf.files import disk, jsonread
from stepgguf.quants.codec import Loss

_RECORD = struct.Struct("<II56s")
_MADE = struct.Struct("<32s3d")
_MAX_HEAD = 2**20


@dataclass(frozen=True, slots=True)
class Made:
    """A finished unit: the sha256 of its bytes, and what encoding them lost (None: nothing was encoded)."""

    digest: bytes
    loss: Loss | None


class Journal:
    """The journal at `path`, held until `close`. BlockingIOError if another process holds it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd = disk.hold(path, make=True)
        self._end = 0

    def read(self, n_units: int) -> tuple[dict[str, Any], dict[int, Made]] | None:
        """The first line, and the units that were entered; None if there is no whole first line.

        What follows a damaged entry does not count.
        """
        content = bytearray(min(os.fstat(self.fd).st_size, _MAX_HEAD + n_units * _RECORD.size))
        disk.read_at(self.fd, content, 0, str(self.path), OutputError)
        head, newline, records = bytes(content).partition(b"\n")
        try:
            label = jsonread.parse(head, str(self.path), OutputError).object()
        except OutputError:
            return None
        if not newline:
            return None
        self._end = len(head) + 1
        finished: dict[int, Made] = {}
        for number, check, made in _RECORD.iter_unpack(records[: len(records) // _RECORD.size * _RECORD.size]):
            if check != zlib.crc32(made, number) or number >= n_units:
                break
            digest, *sums = _MADE.unpack(made)
            finished[number] = Made(digest, None if math.isnan(sums[0]) else Loss(*sums))
            self._end += _RECORD.size
        return label, finished

    def begin(self, label: Mapping[str, Any]) -> None:
        """A new journal, without entries."""
        head = json.dumps(label).encode() + b"\n"
        os.ftruncate(self.fd, 0)
        disk.write_at(self.fd, head, 0)
        self._end = len(head)
        self._sync()

    def resume(self) -> None:
        """Go on behind the last entry that `read` found."""
        os.ftruncate(self.fd, self._end)
        self._sync()

    def enter(self, finished: Mapping[int, Made]) -> None:
        """Units whose bytes are on the disk."""
        records = b"".join(_record(number, made) for number, made in finished.items())
        disk.write_at(self.fd, records, self._end)
        self._end += len(records)
        os.fsync(self.fd)

    def remove(self) -> None:
        """The work is done."""
        self.path.unlink()
        disk.sync_folder(self.path.parent)

    def close(self) -> None:
        os.close(self.fd)

    def _sync(self) -> None:
        os.fsync(self.fd)
        disk.sync_folder(self.path.parent)


def _record(number: int, made: Made) -> bytes:
    sums = (math.nan,) * 3 if made.loss is None else (made.loss.weighted, made.loss.energy, made.loss.squared)
    packed = _MADE.pack(made.digest, *sums)
    return _RECORD.pack(number, zlib.crc32(packed, number), packed)
