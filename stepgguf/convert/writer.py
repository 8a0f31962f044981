"""Output files that survive anything: written in place, journaled, resumed, renamed at the end.

    DEST.part      the GGUF itself, full size from the start: header first, tensors at their final offsets
    DEST.journal   line 1: JSON, what is being made of what; then 64 bytes for each finished unit:
                   number u32, crc32 of number and the rest u32, sha256 of its bytes, its codec.Loss 3 x f64 (or NaN)
    DEST.manifest.json   digests and losses, kept beside the finished file for `stepgguf verify` and `report`

A unit enters the journal only after its bytes are on the disk (fdatasync), so neither kill -9 nor a power cut leaves
an entry without its bytes. Resuming redoes exactly the units that are not in the journal; since each unit's bytes are
a function of source and plan, the end is byte-identical. The final name appears by rename, when all is there.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepgguf import __version__
from stepgguf.convert import ledger
from stepgguf.convert.plan import Plan, PlannedFile, Unit
from stepgguf.errors import OutputError, VerifyError
from stepgguf.quants.codec import Loss

_RECORD = struct.Struct("<II56s")
_MADE = struct.Struct("<32s3d")
_VERSION = 2


@dataclass(frozen=True, slots=True)
class Made:
    """A finished unit: the sha256 of its bytes, and what encoding them lost (None: nothing was encoded)."""

    digest: bytes
    loss: Loss | None


class Writer:
    """The output of one plan. `finished` holds its finished units by number, also those of an interrupted run."""

    def __init__(
        self, plan: Plan, identity: Mapping[str, str], *, restart: bool = False, overwrite: bool = False
    ) -> None:
        self.plan = plan
        self.units = list(plan.units())
        self.finished: dict[int, Made] = {}
        self._journal_path = _beside(plan.files[0].path, ".journal")
        self._journal: int | None = None
        self._fds: list[int] = []
        self._label = _label(plan, identity)
        try:
            if self._journal_path.exists():
                self._lock()
            if restart:
                self._forget()
            resumed = self._resume()
            if not resumed:
                self._refuse_existing(overwrite)
                self._check_space()
            self._open(resumed)
        except BaseException:
            self.close()
            raise

    # opening ----------------------------------------------------------------------------------------------------

    def _lock(self) -> None:
        """Hold the journal, so that no second process writes the same files."""
        if self._journal is None:
            with disk_errors(self._journal_path):
                self._journal = os.open(self._journal_path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(
                f"{self._journal_path} is in use: another stepgguf is writing this file", hint="Wait for it to end."
            ) from None

    def _forget(self) -> None:
        for file in self.plan.files:
            _beside(file.path, ".part").unlink(missing_ok=True)
        self._journal_path.unlink(missing_ok=True)
        self.close()

    def _resume(self) -> bool:
        """Read the journal of an interrupted run. A different run's journal is refused."""
        if not self._journal_path.exists():
            return False
        first, _, records = self._journal_path.read_bytes().partition(b"\n")
        try:
            found = json.loads(first)
        except ValueError:
            return False  # killed while the first line was being written: nothing is lost
        changed = [key for key in self._label if found.get(key) != self._label[key]]
        if changed:
            raise OutputError(
                f"{self._journal_path} is of an interrupted run with another {_named(changed, found, self._label)}",
                hint="Repeat that command to finish it, or start anew with --restart.",
            )
        finished: dict[int, Made] = {}
        for number, check, made in _RECORD.iter_unpack(records[: len(records) // _RECORD.size * _RECORD.size]):
            if check != zlib.crc32(made, number) or number >= len(self.units):
                break  # torn by a crash: this and what follows is redone
            digest, *sums = _MADE.unpack(made)
            finished[number] = Made(digest, None if math.isnan(sums[0]) else Loss(*sums))
        complete = len(finished) == len(self.units)  # then some files may have their final names already
        for file in self.plan.files:
            if not _beside(file.path, ".part").exists() and not (complete and _is_whole(file)):
                return False  # somebody removed the data
        self.finished = finished
        return True

    def _refuse_existing(self, overwrite: bool) -> None:
        for file in self.plan.files:
            if file.path.exists() and not overwrite:
                raise OutputError(f"{file.path} exists", hint="Choose another name or replace it with --overwrite.")

    def _check_space(self) -> None:
        folder = self.plan.files[0].path.parent
        if not folder.is_dir():
            raise OutputError(f"{folder} is not a directory", hint="Create it first.")
        self._forget()
        need, free = sum(file.size for file in self.plan.files), shutil.disk_usage(folder).free
        if need > free:
            raise OutputError(
                f"{folder} has {gib(free)} free, the output needs {gib(need)}",
                hint="Free some space, choose another disk or a smaller type.",
            )

    def _open(self, resumed: bool) -> None:
        self._lock()
        assert self._journal is not None
        with disk_errors(self.plan.files[0].path):
            for file in self.plan.files:
                part = _beside(file.path, ".part")
                target = part if part.exists() or not (resumed and _is_whole(file)) else file.path
                fd = os.open(target, os.O_RDWR | os.O_CREAT, 0o644)
                self._fds.append(fd)
                os.ftruncate(fd, file.size)
                write_all(fd, file.header, 0)
            head = json.dumps(self._label).encode() + b"\n"
            records = b"".join(self._record(number) for number in self.finished)
            os.ftruncate(self._journal, 0)
            write_all(self._journal, head + records, 0)
            self._journal_end = len(head) + len(records)
            os.fsync(self._journal)

    # writing ----------------------------------------------------------------------------------------------------

    def write(self, number: int, data: NDArray[np.uint8], loss: Loss | None = None) -> Made:
        """Put a unit's bytes in their place. Called from many threads."""
        unit = self.units[number]
        file = self.plan.files[unit.file]
        offset = len(file.header) + file.offsets[unit.tensor] + unit.start * file.tensors[unit.tensor].row_bytes
        write_all(self._fds[unit.file], data.data, offset)
        return Made(hashlib.sha256(data.data).digest(), loss)

    def commit(self, finished: Mapping[int, Made]) -> None:
        """Make finished units durable, then enter them in the journal."""
        for index in {self.units[number].file for number in finished}:
            os.fdatasync(self._fds[index]) if hasattr(os, "fdatasync") else os.fsync(self._fds[index])
        self.finished.update(finished)
        records = b"".join(self._record(number) for number in finished)
        assert self._journal is not None
        write_all(self._journal, records, self._journal_end)
        self._journal_end += len(records)
        os.fsync(self._journal)

    def _record(self, number: int) -> bytes:
        made = self.finished[number]
        sums = (math.nan,) * 3 if made.loss is None else (made.loss.weighted, made.loss.energy, made.loss.squared)
        packed = _MADE.pack(made.digest, *sums)
        return _RECORD.pack(number, zlib.crc32(packed, number), packed)

    def finish(self) -> None:
        """Manifests, final names, and the journal's end."""
        assert len(self.finished) == len(self.units)
        with disk_errors(self.plan.files[0].path):
            for index, file in enumerate(self.plan.files):
                os.fsync(self._fds[index])
                manifest = json.dumps(self._manifest(index), indent=1) + "\n"
                _beside(file.path, ".manifest.json").write_text(manifest)
            self.close()
            for file in self.plan.files:
                part = _beside(file.path, ".part")
                if part.exists():
                    part.replace(file.path)
            _sync_directory(self.plan.files[0].path.parent)
            self._journal_path.unlink()

    def close(self) -> None:
        """Let go of the files. What is committed can be resumed."""
        for fd in (*self._fds, *([] if self._journal is None else [self._journal])):
            os.close(fd)
        self._fds, self._journal = [], None

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _manifest(self, index: int) -> dict[str, Any]:
        file = self.plan.files[index]
        units: dict[int, list[tuple[Unit, Made]]] = {}
        for number, unit in enumerate(self.units):
            if unit.file == index:
                units.setdefault(unit.tensor, []).append((unit, self.finished[number]))
        importance, recipe = self.plan.importance, self.plan.recipe
        return {
            "made_by": f"stepgguf {__version__}",
            "file": file.path.name,
            "bytes": file.size,
            "type": self.plan.type_name,
            **({} if recipe.is_stock else {"recipe": recipe.text}),
            "header_sha256": hashlib.sha256(file.header).hexdigest(),
            **({} if importance is None else {"imatrix": importance.described()}),
            "tensors": {
                tensor.name: {
                    "type": tensor.ggml_type.name,
                    "shape": list(tensor.shape),
                    "rows_per_unit": tensor.rows_per_unit,
                    "sha256": [made.digest.hex() for _, made in units[i]],
                    **ledger.entry(tensor, [(unit, made.loss) for unit, made in units[i]], importance),
                }
                for i, tensor in enumerate(file.tensors)
            },
        }


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns the system's errors into OutputError: a full disk says how to go on."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message, remedy = f"{path.parent}: the disk is full", "Free some space and repeat the command; it resumes."
        else:
            message, remedy = f"{error.filename or path}: {error.strerror or error}", "Repeat the command; it resumes."
        raise OutputError(message, hint=remedy) from error


def manifest_path(path: Path) -> Path:
    """The manifest of a finished file."""
    return _beside(path, ".manifest.json")


def read_manifest(file: Path, otherwise: str) -> dict[str, Any]:
    """The manifest of a finished file. VerifyError, with the hint `otherwise`, if it has none that can be read."""
    path = manifest_path(file)
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda _: None)  # NaN
    except OSError:
        raise VerifyError(f"{path} is not there", hint=otherwise) from None
    except ValueError as error:
        raise VerifyError(f"{path}: not valid JSON ({error})", hint=otherwise) from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("tensors"), dict):
        raise VerifyError(f"{path}: not a manifest of stepgguf", hint=otherwise)
    return manifest


def write_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data).cast("B")
    while view:
        n = os.pwrite(fd, view, offset)
        view, offset = view[n:], offset + n


def gib(n: int) -> str:
    return f"{n / 2**30:.2f} GiB"


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _is_whole(file: PlannedFile) -> bool:
    """Whether this file of an interrupted run had already been renamed."""
    return file.path.exists() and file.path.stat().st_size == file.size


def _label(plan: Plan, identity: Mapping[str, str]) -> dict[str, Any]:
    """What must be the same for a run to be resumed. The header's digest covers types, shapes and metadata."""
    return {
        "journal": _VERSION,
        "type": plan.type_name,
        "mtp": plan.mtp,
        "files": [file.path.name for file in plan.files],
        "source": dict(sorted(identity.items())),
        "imatrix": plan.importance.identity() if plan.importance else None,
        "kernel": plan.kernel,
        "header": hashlib.sha256(b"".join(file.header for file in plan.files)).hexdigest(),
    }


def _named(changed: Iterable[str], found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """The first difference in words."""
    key = next(iter(changed))
    if key == "source":
        before, now = found.get(key) or {}, wanted[key]
        files = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
        return f"source: {', '.join(files[:3])} changed"
    if key == "header":
        return "version, name, chat template or other metadata"
    return f"{key}: {found.get(key)} then, {wanted[key]} now"


def _sync_directory(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
