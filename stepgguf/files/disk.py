"""Writing so that nothing is lost: whole, durable, by one process at a time; and the system's errors in words.

A file that others may look at is written beside its place and renamed into it, and the folder is synced: after a power
cut it is the old one or the new one. A file that several runs of this program go on with is held (flock) while it is
written. Whoever holds a file may remove it, and nobody else may.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from stepgguf.errors import OutputError

_RESUME = "Repeat the command; it resumes."
_HINTS = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "Free some space and repeat the command; it resumes."),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "Choose a folder that you may write to."),
    **dict.fromkeys(
        (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL),
        "Choose another name or folder.",
    ),
}


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns the system's errors into OutputError with what to do. `path` is named where the system names nothing."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        found = f"{path.parent}: the disk is full" if full else f"{error.filename or path}: {error.strerror or error}"
        raise OutputError(found, hint=_HINTS.get(error.errno or 0, _RESUME)) from error


def hold(path: Path, *, make: bool = False) -> int:
    """Open a file and hold it; `make` it if it is not there. BlockingIOError while another process holds it.

    Between open and flock its holder may have removed or replaced it; what is held then is no longer at this path, and
    another try gets what is.
    """
    while True:
        fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | (os.O_CREAT if make else 0), 0o644)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise OSError(errno.EINVAL, "Not a regular file", str(path))
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if is_at(fd, path):
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def open_regular(path: Path) -> BinaryIO:
    """Open a file to read it. OSError for a folder, and for a pipe or a device, which might never end or begin."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(fd, "rb")
    os.close(fd)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.EINVAL, "Not a regular file", str(path))


def is_at(fd: int, path: Path) -> bool:
    """Whether the open file is the one at this path."""
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except OSError:
        return False


def write_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data).cast("B")
    while view:
        n = os.pwrite(fd, view, offset)
        view, offset = view[n:], offset + n


def replace(path: Path, data: bytes) -> None:
    """Put a file at path, durably: it is there whole, or what was there before still is."""
    part = path.with_name(f"{path.name}.new")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        error.filename = str(path)
        with suppress(OSError):
            part.unlink()
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make names in it durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
