"""Change a finished file's metadata without touching its tensors.

`stepgguf convert` leaves a key of spaces at the end of the metadata (metadata.RESERVE). A new chat template takes its
room from there: the header keeps its length, the data its place, and 100 GB need not be copied. A file without enough
room is copied once and then has it.

The template that a file was made with stays in it under ORIGINAL, so that it can be put back.

The header is replaced in place after a copy of the old one has reached the disk as FILE.header; if that file exists
when we start, a crash has come between, and the old header is put back first.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gguf import GGUFValueType

from stepgguf.convert.manifest import manifest_path, read_manifest, write_manifest
from stepgguf.convert.metadata import CHAT_TEMPLATE, RESERVE, RESERVE_BYTES, reserve_key
from stepgguf.convert.sources.splits import split_files
from stepgguf.errors import BadMetadata, OutputError
from stepgguf.files import disk, gguf_header
from stepgguf.files.disk import disk_errors
from stepgguf.files.gguf_header import Header, Key

ORIGINAL = "stepgguf.chat_template.original"
_COPY_BYTES = 64 * 2**20


def read_chat_template(path: Path) -> str:
    """The chat template of a GGUF."""
    text = gguf_header.read(split_files(path)[0]).get(CHAT_TEMPLATE)
    if not isinstance(text, str):
        raise BadMetadata(f"{path} has no chat template", hint="Give one: stepgguf template FILE.gguf NEW.jinja")
    return text


def replace_chat_template(path: Path, text: str) -> None:
    """Put another chat template into a GGUF (the first file, if it is split). OutputError while another run does."""

    def change(keys: dict[str, Key]) -> None:
        original = keys.get(ORIGINAL) or keys.get(CHAT_TEMPLATE)
        if original is not None:
            keys[ORIGINAL] = Key(ORIGINAL, original.type, original.raw)
        keys[CHAT_TEMPLATE] = Key.of(CHAT_TEMPLATE, text, GGUFValueType.STRING)

    _rewrite(split_files(path)[0], change)


def restore_chat_template(path: Path) -> None:
    """Put back the chat template that a GGUF was made with."""

    def change(keys: dict[str, Key]) -> None:
        if ORIGINAL not in keys:
            raise BadMetadata(
                f"{path} has the chat template that it was made with", hint="There is nothing to put back."
            )
        original = keys.pop(ORIGINAL)
        keys[CHAT_TEMPLATE] = Key(CHAT_TEMPLATE, original.type, original.raw)

    _rewrite(split_files(path)[0], change)


def _rewrite(path: Path, change: Callable[[dict[str, Key]], None]) -> None:
    """Give a file changed keys: in place if they fit into the old header's length, else in a copy."""
    backup = path.with_name(path.name + ".header")
    with disk_errors(path), _hold(path):
        if backup.exists():  # a crash came between: the header may be half old and half new
            _overwrite_header(path, backup.read_bytes())
        old, manifest = gguf_header.read(path), _read_own_manifest(path)
        keys = {name: key for name, key in old.keys.items() if name != RESERVE}
        change(keys)
        new = _encode_at_length(keys, old)
        if new is None:
            new = gguf_header.encode([*keys.values(), reserve_key(RESERVE_BYTES)], old.tensors, old.alignment)
            _copy_with_header(path, old.data_start, new)
        else:
            with path.open("rb") as file:
                disk.replace(backup, file.read(old.data_start))
            _overwrite_header(path, new)
        backup.unlink(missing_ok=True)
        if manifest is not None:
            changes = {"header_sha256": hashlib.sha256(new).hexdigest(), "bytes": path.stat().st_size}
            kept = {key: value for key, value in manifest.items() if key != "sha256"}  # the whole file's, which changed
            write_manifest(path, kept | changes)


@contextmanager
def _hold(path: Path) -> Iterator[None]:
    """Hold a file while it is changed. Raises OutputError if another process holds it."""
    try:
        fd = disk.hold(path)
    except BlockingIOError:
        raise OutputError(f"{path} is in use: another stepgguf is changing it", hint="Wait for it to end.") from None
    try:
        yield
    finally:
        os.close(fd)


def _encode_at_length(keys: dict[str, Key], old: Header) -> bytes | None:
    """The header with these keys and a reserve that gives it the old length; None if they do not fit."""
    with_none = len(gguf_header.encode([*keys.values(), reserve_key(0)], old.tensors, 1))
    room = old.data_start - with_none
    if room < 0:
        return None
    return gguf_header.encode([*keys.values(), reserve_key(room)], old.tensors, old.alignment)


def _overwrite_header(path: Path, header: bytes) -> None:
    """Put a header of the same length in the place of the old one, durably."""
    fd = os.open(path, os.O_RDWR)
    try:
        disk.write_at(fd, header, 0)
        os.fsync(fd)
    finally:
        os.close(fd)


def _copy_with_header(path: Path, data_start: int, header: bytes) -> None:
    """A new file with another header and the same data, renamed over the old one."""
    with path.open("rb") as source, disk.replacing(path) as target:
        target.write(header)
        source.seek(data_start)
        shutil.copyfileobj(source, target, _COPY_BYTES)


def _read_own_manifest(path: Path) -> dict[str, Any] | None:
    """The file's manifest if it has one. A damaged one is an error before anything is changed."""
    return read_manifest(path, "Remove it, or fetch it again.") if manifest_path(path).exists() else None
