"""Output files that survive anything: written in place, journaled, resumed, renamed at the end.

    DEST.part            the GGUF itself, full size from the start: header first, tensors at their final offsets
    DEST.journal         which units of it are done (journal.py)
    DEST.manifest.json   digests and losses, kept beside the finished file (manifest.py)

Opening is a row of steps, and the first makes all others safe from a second process:

    hold      the journal and every .part, made empty if they are not there
    resume    are they of an interrupted run of the same command? then its finished units count
    refuse    a name that is taken, unless --overwrite; of a resumed run too
    space     enough for what is not resumed
    clear     what an earlier run left
    open      headers, full sizes, the journal's first line

Resuming redoes exactly the units that are not in the journal; since each unit's bytes are a function of source and
plan, the end is byte-identical. Finishing goes from the data to the name: data, manifest, rename, the journal last.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepgguf.convert import manifest
from stepgguf.convert.journal import FinishedUnit, Journal
from stepgguf.convert.plan import Plan, PlannedFile
from stepgguf.errors import OutputError
from stepgguf.files import disk, jsonread
from stepgguf.files.byte_sizes import readable_size
from stepgguf.files.disk import disk_errors
from stepgguf.quants.kernels import Loss

_VERSION = 3


class Writer:
    """The output of one plan. `finished` holds its finished units by number, also those of an interrupted run.

    working_bytes: what other files need of the disk while it is made. label: what must be the same to be resumed.
    """

    def __init__(
        self,
        plan: Plan,
        identity: Mapping[str, str],
        *,
        restart: bool = False,
        overwrite: bool = False,
        working_bytes: int = 0,
    ) -> None:
        self.plan = plan
        self.units = list(plan.units())
        self.finished: dict[int, FinishedUnit] = {}
        self._folder = plan.files[0].path.parent
        self._overwrite, self._working_bytes = overwrite, working_bytes
        self.label = _describe_run(plan, identity)
        self._journal: Journal | None = None
        self._parts: list[int] = []  # descriptors, one for each file
        self._renamed: set[int] = set()  # numbers of files that an interrupted run had finished
        try:
            with disk_errors(plan.files[0].path):
                self._hold()
                resumed = not restart and self._resume()
                self._refuse_existing()
                if not resumed:
                    self._check_space()
                    self._clear()
                self._open(resumed)
        except BaseException:
            self.close()
            raise

    # opening ----------------------------------------------------------------------------------------------------

    def _hold(self) -> None:
        if not self._folder.is_dir():
            raise OutputError(
                f"{self._folder} is not a directory", hint=f"Create it first: mkdir -p {quote(str(self._folder))}"
            )
        with suppress(FileNotFoundError):
            # The longest name that will be needed: a name too long is an error before anything is made.
            os.lstat(f"{manifest.manifest_path(self.plan.files[0].path)}.new")
        try:
            self._journal = Journal(_with_suffix(self.plan.files[0].path, ".journal"))
            for file in self.plan.files:
                self._parts.append(disk.hold(_part_path(file), make=True))
        except BlockingIOError:
            raise _in_use(self.plan.files[0].path) from None

    def _resume(self) -> bool:
        """Whether the journal is of an interrupted run of this plan; then its finished units count.

        Raises OutputError if it is of a run that would have made something else.
        """
        assert self._journal is not None
        found = self._journal.read_finished(len(self.units))
        if found is None:
            return False
        label, finished = found
        changed = [key for key in self.label if label.get(key) != self.label[key]]
        if changed:
            raise _of_another_run(self._journal.path, changed[0], label, self.label)
        # A file that is not at its .part was renamed, which comes after the last unit, or somebody removed it.
        missing = {i for i, file in enumerate(self.plan.files) if not _is_planned_file(file, self._parts[i])}
        if missing and not (len(finished) == len(self.units) and all(map(self._has_final_name, missing))):
            return False  # somebody removed data that the journal counts as finished
        self.finished, self._renamed = finished, missing
        return True

    def _has_final_name(self, index: int) -> bool:
        """Whether a file is finished: a run that was cut off between two renames leaves such files."""
        file = self.plan.files[index]
        try:
            fd = os.open(file.path, os.O_RDONLY | os.O_NONBLOCK)
        except OSError:
            return False
        try:
            return _is_planned_file(file, fd)
        finally:
            os.close(fd)

    def _refuse_existing(self) -> None:
        for index, file in enumerate(self.plan.files):
            if index in self._renamed or not os.path.lexists(file.path):
                continue
            if not file.path.is_file():  # never rename over a device or a pipe, whoever asks for it
                what = "a directory" if file.path.is_dir() else "there and not a file"
                raise OutputError(f"{file.path} is {what}", hint="Choose another name.")
            if not self._overwrite:
                raise name_taken(file.path)

    def _check_space(self) -> None:
        # What an earlier run left is cleared next, so its blocks are free.
        held = sum(os.fstat(fd).st_blocks * 512 for fd in self._parts)
        need, free = self.plan.file_bytes + self._working_bytes, shutil.disk_usage(self._folder).free + held
        if need > free:
            working = f", {readable_size(self._working_bytes)} of it for working files" if self._working_bytes else ""
            raise OutputError(
                f"{self._folder} has {readable_size(free)} free, the output needs {readable_size(need)}{working}",
                hint="Free some space, choose another disk or a smaller type"
                + (", fewer --calibrate-tokens or no --keep." if self._working_bytes else "."),
            )

    def _clear(self) -> None:
        assert self._journal is not None
        for fd in (self._journal.fd, *self._parts):
            os.ftruncate(fd, 0)

    def _open(self, resumed: bool) -> None:
        assert self._journal is not None
        if resumed:
            self._journal.resume()
            return
        for file, fd in zip(self.plan.files, self._parts, strict=True):
            os.ftruncate(fd, file.size)
            disk.write_at(fd, file.header, 0)
        self._journal.begin(self.label)

    # writing ----------------------------------------------------------------------------------------------------

    def write_unit(self, number: int, data: NDArray[np.uint8], loss: Loss | None = None) -> FinishedUnit:
        """Put a unit's bytes [n, row_bytes] in their place in its file. Called from many threads."""
        unit = self.units[number]
        file = self.plan.files[unit.file]
        offset = len(file.header) + file.offsets[unit.tensor] + unit.start * file.tensors[unit.tensor].row_bytes
        disk.write_at(self._parts[unit.file], data.data, offset)
        return FinishedUnit(hashlib.sha256(data.data).digest(), loss)

    def commit(self, finished: Mapping[int, FinishedUnit]) -> None:
        """Make finished units durable, then enter them in the journal."""
        assert self._journal is not None
        for index in {self.units[number].file for number in finished}:
            disk.sync_data(self._parts[index])  # the size was set when the file was opened
        self.finished.update(finished)
        self._journal.add_finished(finished)

    def finish(self) -> None:
        """Data, manifests, final names, and the journal's end: each on the disk before the next begins."""
        assert self._journal is not None
        assert len(self.finished) == len(self.units)
        with disk_errors(self.plan.files[0].path):
            self._refuse_existing()  # again: hours may have passed
            for fd in self._parts:
                os.fsync(fd)
            for index, file in enumerate(self.plan.files):
                manifest.write_manifest(file.path, manifest.describe_file(self.plan, index, self.finished))
            for index, file in enumerate(self.plan.files):
                if index not in self._renamed:
                    _part_path(file).replace(file.path)
            disk.sync_folder(self._folder)
            self._journal.remove()
        self.close()

    def close(self) -> None:
        """Let go of the files. What is committed can be resumed; what is empty is removed."""
        journal, parts = self._journal, self._parts
        self._journal, self._parts = None, []
        for file, fd in zip(self.plan.files, parts, strict=False):
            disk.release(fd, _part_path(file))
        if journal is not None:
            journal.close()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def name_taken(path: Path) -> OutputError:
    """The error for a name at which there is a file already, to be raised."""
    return OutputError(f"{path} exists", hint="Choose another name or replace it with --overwrite.")


def is_taken(path: Path) -> bool:
    """Whether there is a file, and no interrupted run that was about to finish it."""
    return os.path.lexists(path) and not _with_suffix(path, ".journal").exists()


def require_same_calibration(dest: Path, calibration: str) -> None:
    """OutputError if an interrupted run that makes `dest` has another calibration, or another process makes it now."""
    path = _with_suffix(dest, ".journal")
    if not path.exists():
        return
    try:
        journal = Journal(path)
    except BlockingIOError:
        raise _in_use(dest) from None
    found = journal.read_finished(0)
    journal.close()
    if found is not None and found[0].get("calibration") != calibration:
        raise _of_another_run(path, "calibration", found[0], {"calibration": calibration})


def _in_use(path: Path) -> OutputError:
    return OutputError(f"{path} is in use: another stepgguf is writing it", hint="Wait for it to end.")


def _with_suffix(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _part_path(file: PlannedFile) -> Path:
    return _with_suffix(file.path, ".part")


def _is_planned_file(file: PlannedFile, fd: int) -> bool:
    """Whether this is the planned file, of full size and with its header."""
    if os.fstat(fd).st_size != file.size:
        return False
    found = bytearray(len(file.header))
    disk.read_at(fd, found, 0, str(file.path), OutputError)
    return found == file.header


def _describe_run(plan: Plan, identity: Mapping[str, str]) -> dict[str, Any]:
    """What must be the same for a run to be resumed. The header's digest covers types, shapes and metadata."""
    return {
        "journal": _VERSION,
        "type": plan.type_name,
        "mtp": plan.mtp,
        "files": [file.path.name for file in plan.files],
        "source": dict(sorted(identity.items())),
        "imatrix": plan.importance.identity() if plan.importance else None,
        "kernel": plan.kernel,
        "calibration": plan.calibration,
        "header": hashlib.sha256(b"".join(file.header for file in plan.files)).hexdigest(),
    }


def _of_another_run(path: Path, key: str, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> OutputError:
    """The error for a journal whose run is another one. key: where the labels differ."""
    moved = _moved_repository(found, wanted) if key == "source" else None
    commit = f" at its commit ({moved})" if moved else ""
    return OutputError(
        f"{path} is of an interrupted run with another {_difference(key, found, wanted)}",
        hint=f"Repeat that command{commit} to finish it, or start anew with --restart.",
    )


def _moved_repository(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    """The address on the Hub, with its commit, that an interrupted run read from; None if it is the same now."""
    before = found.get("source")
    addresses = [name for name in before if name.startswith("hf:")] if isinstance(before, dict) else []
    return next((name for name in addresses if name not in wanted["source"]), None)


def _difference(key: str, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """How two runs' labels differ, in words."""
    if key == "source":
        before, now = found.get(key), wanted[key]
        before = before if isinstance(before, dict) else {}
        files = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
        return f"source: {', '.join(files[:3])} changed"
    if key == "header":
        return "version, name, chat template or other metadata"
    before, now = (
        value if isinstance(value, str) else jsonread.shown(value) for value in (found.get(key), wanted[key])
    )
    return f"{key}: {before[:60]} then, {now} now"
