"""The folder that a stream works in, beside what it makes: kept when the run is interrupted, removed at its end."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from stepgguf.errors import OutputError
from stepgguf.files import disk
from stepgguf.files.byte_sizes import readable_size

_LOCK = "lock"


@contextmanager
def work_folder(path: Path, n_bytes: int) -> Iterator[Path]:
    """The folder, made if it is not there, and held: what is made in the block's folders is removed when it ends well.

    n_bytes: the most that will be in it. Its files are mapped, and the system ends a process that writes to a mapped
    file on a full disk, so room is asked for first. OutputError: there is too little, or another process works in it.
    """
    with disk.disk_errors(path):
        path.mkdir(exist_ok=True)
        try:
            lock = disk.hold(path / _LOCK, make=True)
        except BlockingIOError:
            raise OutputError(
                f"{path} is in use: another stepgguf works in it", hint="Wait for it to end, or choose another name."
            ) from None
    try:
        _check_room(path, n_bytes)
        yield path
        for folder in path.iterdir():
            if folder.is_dir():
                shutil.rmtree(folder)
    finally:
        disk.release(lock, path / _LOCK)
        with suppress(OSError):  # not empty: what an interrupted run goes on with
            path.rmdir()


def _check_room(path: Path, n_bytes: int) -> None:
    there, free = disk.used_bytes(path), shutil.disk_usage(path).free
    if free + there < n_bytes:
        raise OutputError(
            f"{path.parent}: {readable_size(free)} free, and working files take up to {readable_size(n_bytes)}",
            hint="Write to another disk, or use less text.",
        )
