"""Compiled kernels are kept, and a damaged one is compiled again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stepgguf.files import folders
from stepgguf.quants.lanes import compile

pytestmark = pytest.mark.slow


def new_kernel() -> Any:
    """A kernel as a new process would have it."""

    def add(a: float, b: float) -> float:
        return a + b

    return compile.kernel(add, "add")


@pytest.mark.parametrize(
    "damage", [b"", b"short", bytes(4096), None], ids=["empty", "cut in the digest", "zeros", "a flipped bit"]
)
def test_a_damaged_file_is_compiled_again(
    damage: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "kernels", lambda: tmp_path / "kernels")
    first = new_kernel()
    assert not compile.is_cached(first, (1.0, 2.0))
    assert first(1.0, 2.0) == 3.0
    second = new_kernel()
    assert compile.is_cached(second, (1.0, 2.0))
    assert second(1.0, 2.0) == 3.0
    [path] = (tmp_path / "kernels").iterdir()
    whole = path.read_bytes()
    flipped = whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:]
    path.write_bytes(flipped if damage is None else damage)
    assert new_kernel()(1.0, 2.0) == 3.0
    assert len(path.read_bytes()) == len(whole)


def test_a_folder_that_cannot_be_written_costs_nothing_but_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(folders, "kernels", lambda: tmp_path / "file" / "kernels")
    assert new_kernel()(1.0, 2.0) == 3.0
