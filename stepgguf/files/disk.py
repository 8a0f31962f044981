"""Bytes on the disk: reading and writing at a place, whole and durable files, and the system's errors in words.

A file that others may look at is written beside its place and renamed into it, and the folder is synced: after a power
cut it is the old one or the new one. A file that several runs of this program go on with is held (flock) while it is
written. Whoever holds a file may remove it, and nobody else may.

Large files are read and written by position (pread, pwrite): threads share a descriptor without a seek between them,
memory is what is in flight, and a disk error is an OSError with a name where a mapping would give SIGBUS.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from stepgguf.errors import OutputError, StepggufError

_PIECE = 16 * 2**20  # bytes that are read at a time
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
                raise NotAFile(errno.EINVAL, "Not a regular file", str(path))
            # However this process ends, the system lets go of the lock.
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if is_at(fd, path):
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def release(fd: int, path: Path) -> None:
    """Close a file that is held. An empty one holds nothing to go on with: it is removed while it is still ours."""
    if os.fstat(fd).st_size == 0 and is_at(fd, path):
        path.unlink()
    os.close(fd)


def is_held(path: Path) -> bool:
    """Whether a process holds a file now; False if there is none. The look itself holds it for a moment, shared."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def sha256(path: Path, step: Callable[[int], None]) -> str:
    """The SHA-256 of a whole file, in hex. step: called with the size of each piece that is read."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
            step(len(piece))
    return digest.hexdigest()


def used_bytes(folder: Path) -> int:
    """What the files in a folder, and in its folders, take of the disk; 0 if there is none."""
    return sum(file.stat().st_blocks * 512 for file in folder.rglob("*") if file.is_file())


class NotAFile(OSError):
    """What is at a path is a folder, a pipe or a device."""


def open_regular(path: Path) -> BinaryIO:
    """Open a file to read it. NotAFile for a folder, and for a pipe or a device, which might never end or begin."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # without O_NONBLOCK, opening a pipe waits for its writer
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(fd, "rb")
    os.close(fd)
    if stat.S_ISDIR(mode):
        raise NotAFile(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise NotAFile(errno.EINVAL, "Not a regular file", str(path))


def is_at(fd: int, path: Path) -> bool:
    """Whether the open file is the one at this path, and not one that was removed or renamed."""
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except OSError:
        return False


def read_at(fd: int, into: bytearray | memoryview, offset: int, name: str, error: type[StepggufError]) -> None:
    """Fill a buffer with the bytes at `offset`. `error`, which calls them `name`, if the file ends before."""
    view = memoryview(into)
    while view:  # one call reads at most 2 GiB, and less where a signal comes
        n = os.preadv(fd, [view], offset)
        if n == 0:
            raise error(f"{name}: the file ended {len(view)} bytes early", hint="It changed while being read.")
        view, offset = view[n:], offset + n


def prefetch_at(fd: int, size: int, offset: int) -> None:
    """Start reading in the background, where the system can (Linux)."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, offset, size, os.POSIX_FADV_WILLNEED)


def write_at(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of the data at `offset`."""
    view = memoryview(data).cast("B")
    while view:  # a disk that fills up takes a part of it first
        n = os.pwrite(fd, view, offset)
        view, offset = view[n:], offset + n


def sync_data(fd: int) -> None:
    """Make what was written durable, of a file whose size has not changed since it was synced."""
    # macOS has no fdatasync.
    os.fdatasync(fd) if hasattr(os, "fdatasync") else os.fsync(fd)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file to be written in the block, which then takes this path, durably.

    It is there whole when the block ends. If the block fails, what was there before still is.
    """
    part = path.with_name(f"{path.name}.new")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException as error:
        if isinstance(error, OSError):
            error.filename = str(path)  # the name that the user knows
        with suppress(OSError):
            part.unlink()
        raise
    sync_folder(path.parent)


def replace(path: Path, data: bytes) -> None:
    """Put a file with this content at a path, as `replacing` does."""
    with replacing(path) as file:
        file.write(data)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable: a new or removed file is there, or gone, after a power cut too."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
