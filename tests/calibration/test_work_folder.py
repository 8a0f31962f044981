"""The folder that a stream works in: held by one process, kept when a run is interrupted, removed at its end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from stepgguf.calibration.work_folder import work_folder
from stepgguf.errors import OutputError


def test_it_is_removed_at_the_end_with_what_was_made_in_it(tmp_path: Path) -> None:
    with work_folder(tmp_path / "x.stream", 1000) as folder:
        (folder / "part-0").mkdir()
        (folder / "part-0" / "states-001").write_bytes(b"x")
    assert list(tmp_path.iterdir()) == []


def interrupt_in(path: Path, part: str | None = None) -> None:
    with work_folder(path, 1000) as folder:
        if part is not None:
            (folder / part).mkdir()
        raise KeyboardInterrupt


def test_it_is_kept_when_the_run_ends_early(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        interrupt_in(tmp_path / "x.stream", "part-0")
    assert [path.name for path in (tmp_path / "x.stream").iterdir()] == ["part-0"]


def test_a_run_that_did_nothing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        interrupt_in(tmp_path / "x.stream")
    assert list(tmp_path.iterdir()) == []


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from stepgguf.calibration.work_folder import work_folder\n"
        "with work_folder(Path(sys.argv[1]), 0): pass"
    )
    with work_folder(tmp_path / "x.stream", 1000) as folder:
        command = [sys.executable, "-c", code, str(folder)]
        other = subprocess.run(command, capture_output=True, text=True, check=False)
        assert folder.is_dir()
    assert "OutputError" in other.stderr
    assert "x.stream is in use: another stepgguf works in it" in other.stderr


def test_a_disk_without_room_is_named_before_anything_is_written(tmp_path: Path) -> None:
    too_much = r"GiB free, and working files take up to 1048576\.0 GiB"
    with pytest.raises(OutputError, match=too_much), work_folder(tmp_path / "x.stream", 2**50):
        pytest.fail("it was opened")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match=r"absent/x\.stream: No such file"),
        work_folder(tmp_path / "absent" / "x.stream", 0),
    ):
        pytest.fail("it was opened")
