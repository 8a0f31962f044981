"""Everything of the program's own lies where the system's users look for it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from stepgguf.files import folders


@pytest.mark.skipif(sys.platform != "linux", reason="XDG is Linux's habit")
def test_the_folders_of_linux_are_those_of_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "c"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "d"))
    assert folders.kernels() == tmp_path / "c" / "stepgguf" / "kernels"
    assert folders.sessions() == tmp_path / "d" / "stepgguf" / "sessions"
    assert folders.history() == tmp_path / "d" / "stepgguf" / "history"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert folders.cache() == tmp_path / ".cache" / "stepgguf"


def test_what_an_older_version_kept_elsewhere_is_taken_over_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = tmp_path / "old", tmp_path / "library" / "stepgguf"
    monkeypatch.setattr(folders, "data", lambda: new)
    folders.adopt_data(old)
    assert not new.exists()
    (old / "sessions").mkdir(parents=True)
    (old / "sessions" / "a.jsonl").write_text("{}")
    folders.adopt_data(old)
    assert (new / "sessions" / "a.jsonl").read_text() == "{}"
    assert not old.exists()
    old.mkdir()
    folders.adopt_data(old)
    assert old.exists(), "what is there is never replaced"
