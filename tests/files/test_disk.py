"""Bytes at a place, and files that are whole or not there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stepgguf.errors import OutputError
from stepgguf.files import disk

CONTENT = bytes(range(256)) * 4


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    (tmp_path / "x").write_bytes(CONTENT)
    fd = os.open(tmp_path / "x", os.O_RDWR)
    yield fd
    os.close(fd)


def test_reading_goes_on_until_the_buffer_is_full(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system may give less than was asked for, as it does beyond 2 GiB."""
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: preadv(fd, [views[0][:7]], offset))
    found = bytearray(500)
    disk.read_at(fd, found, 100, "x", OutputError)
    assert found == CONTENT[100:600]


def test_writing_goes_on_until_all_is_written(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, view, offset: pwrite(fd, view[:7], offset))
    disk.write_at(fd, b"x" * 100, 50)
    assert os.pread(fd, 2000, 0) == CONTENT[:50] + b"x" * 100 + CONTENT[150:]


def test_a_file_that_ends_too_early_is_named(fd: int) -> None:
    with pytest.raises(OutputError, match=r"blk\.1: the file ended 6 bytes early"):
        disk.read_at(fd, bytearray(10), len(CONTENT) - 4, "blk.1", OutputError)


def test_a_replacement_takes_the_place_and_leaves_nothing_beside(tmp_path: Path) -> None:
    for content in (b"old", b"new"):
        disk.replace(tmp_path / "x", content)
        assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("x", content)]


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_a_replacement_that_fails_leaves_what_was_there(failure: Any, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"old")

    def fail() -> None:
        with disk.replacing(tmp_path / "x") as file:
            file.write(b"new")
            raise failure

    with pytest.raises((KeyboardInterrupt, OSError)) as caught:
        fail()
    assert getattr(caught.value, "filename", str(tmp_path / "x")) == str(tmp_path / "x")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("x", b"old")]


@pytest.mark.parametrize("what", ["folder", "pipe", "device"])
def test_what_is_no_file_is_told_at_once(what: str, tmp_path: Path) -> None:
    path = tmp_path / what
    {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path), "device": lambda: path.symlink_to("/dev/zero")}[what]()
    with pytest.raises(disk.NotAFile) as caught:
        disk.open_regular(path)
    assert caught.value.filename == str(path)
