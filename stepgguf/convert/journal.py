"""The journal of a conversion: what is being made, and which units of it are on the disk.

    line 1      JSON: what must be the same for a run to be resumed
    then        64 bytes for each finished unit: number u32, crc32 of number and the rest u32, sha256 of the unit's
                bytes, its kernels.Loss 3 x f64 (NaN where nothing was encoded)

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
from stepgguf.quants.kernels import Loss

_RECORD = struct.Struct("<II56s")  # number, crc32, _UNIT
_UNIT = struct.Struct("<32s3d")  # sha256, loss
RECORD_BYTES = _RECORD.size
_MAX_HEAD = 2**20  # of the first line: a checkpoint of a hundred shards has 10 KB of identities


@dataclass(frozen=True, slots=True)
class FinishedUnit:
    """What is known of a unit whose bytes are written: their sha256, and what encoding lost (None: copied)."""

    digest: bytes
    loss: Loss | None


class Journal:
    """The journal at `path`, held until `close`. BlockingIOError if another process holds it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd = disk.hold(path, make=True)
        self._end = 0

    def read_finished(self, n_units: int) -> tuple[dict[str, Any], dict[int, FinishedUnit]] | None:
        """The first line, and the units that were entered; None if there is no whole first line.

        What follows a damaged entry does not count.
        """
        content = bytearray(min(os.fstat(self.fd).st_size, _MAX_HEAD + n_units * RECORD_BYTES))
        disk.read_at(self.fd, content, 0, str(self.path), OutputError)
        found = parse_journal(bytes(content), self.path, n_units)
        if found is None:
            return None
        label, finished, self._end = found
        return label, finished

    def begin(self, label: Mapping[str, Any]) -> None:
        """Start a new journal, without entries. What stood in the file is lost."""
        head = json.dumps(label).encode() + b"\n"
        os.ftruncate(self.fd, 0)
        disk.write_at(self.fd, head, 0)
        self._end = len(head)
        self._sync()

    def resume(self) -> None:
        """Go on behind the last entry that `read_finished` found."""
        os.ftruncate(self.fd, self._end)
        self._sync()

    def add_finished(self, finished: Mapping[int, FinishedUnit]) -> None:
        """Enter units, whose bytes must be on the disk. They are in the journal durably when this returns."""
        records = b"".join(_encode_record(number, unit) for number, unit in finished.items())
        disk.write_at(self.fd, records, self._end)
        self._end += len(records)
        os.fsync(self.fd)

    def remove(self) -> None:
        """Remove the file, since the work is done. It stays held until `close`."""
        self.path.unlink()
        disk.sync_folder(self.path.parent)

    def close(self) -> None:
        """Let go of the file; one without a line is removed."""
        disk.release(self.fd, self.path)

    def _sync(self) -> None:
        os.fsync(self.fd)
        disk.sync_folder(self.path.parent)


def parse_journal(
    content: bytes, path: Path, n_units: int = 2**32
) -> tuple[dict[str, Any], dict[int, FinishedUnit], int] | None:
    """The first line, the units that were entered, and where the last whole entry ends; None without a first line.

    n_units: an entry of a unit beyond these is a damaged one. path: for messages alone.
    """
    head, newline, records = content.partition(b"\n")
    try:
        label = jsonread.parse(head, str(path), OutputError).object()
    except OutputError:
        return None
    if not newline:
        return None
    finished: dict[int, FinishedUnit] = {}
    end = len(head) + 1
    whole = len(records) // RECORD_BYTES * RECORD_BYTES  # a kill may have cut the last one
    for number, check, unit in _RECORD.iter_unpack(records[:whole]):
        if check != zlib.crc32(unit, number) or number >= n_units:
            break
        digest, *sums = _UNIT.unpack(unit)
        finished[number] = FinishedUnit(digest, None if math.isnan(sums[0]) else Loss(*sums))
        end += RECORD_BYTES
    return label, finished, end


def _encode_record(number: int, unit: FinishedUnit) -> bytes:
    sums = (math.nan,) * 3 if unit.loss is None else (unit.loss.weighted, unit.loss.energy, unit.loss.squared)
    packed = _UNIT.pack(unit.digest, *sums)
    return _RECORD.pack(number, zlib.crc32(packed, number), packed)
