"""stepgguf list and stepgguf rm on real conversions."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

from stepgguf.cli import calibrating
from stepgguf.cli.main import main
from stepgguf.files import folders
from tests.calibration import passes
from tests.cli.test_calibrate import ROW, command, write_text
from tests.cli.test_calibrate import interrupt as interrupt_calibration
from tests.cli.test_inspect import write as write_foreign
from tests.convert.test_local_models import PARTS, interrupt, running

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder. There are no sessions, and nobody answers."""
    monkeypatch.setattr(folders, "data", lambda: tmp_path / "data")
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return Path()


def convert(small: Path, dest: str, *options: str) -> None:
    assert main(["convert", str(small), dest, "-t", "Q8_0", "-q", *options]) == 0


def everything(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


def report(capfd: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capfd.readouterr()
    assert main(["list", "--json", *arguments]) == 0
    found: dict[str, Any] = json.loads(capfd.readouterr().out)
    return found


def test_a_line_says_name_size_type_and_state(
    small: Path, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    convert(small, "whole.gguf")
    convert(small, "split.gguf", "--split-max-size", "5M")
    interrupt(small, folder / "un.gguf", 60)
    write_foreign(folder / "foreign.gguf", "llama", tensor="output.weight")
    (folder / "broken.gguf").write_bytes((folder / "whole.gguf").read_bytes()[:-1])
    (folder / "notes.txt").write_text("mine")
    folders.sessions().mkdir(parents=True)
    (folders.sessions() / "a.jsonl").write_text("{}\n")
    with running(small, folder / "now.gguf"):
        assert main(["list"]) == 0
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in capfd.readouterr().out.splitlines() if line}
    assert lines.pop(f"{tmp_path / 'here'}:") == ""
    assert re.fullmatch(r"11\.\d MiB Q8_0 whole", lines["whole.gguf"])
    assert re.fullmatch(r"11\.\d MiB Q8_0 whole, in 3 parts", lines["split-00001-of-00003.gguf"])
    assert re.fullmatch(r"- Q4_K_M unfinished, \d\d% done; [\d.]+ MiB in work", lines["un.gguf"])
    assert re.fullmatch(r"- Q4_K_M unfinished, 0% done; .* in use now", lines["now.gguf"])
    assert re.fullmatch(r"\d+ B - whole; not made by stepgguf", lines["foreign.gguf"])
    assert re.fullmatch(r"11\.\d MiB Q8_0 damaged: .*but its header promises [\d,]+", lines["broken.gguf"])
    assert re.fullmatch(rf"1 file 4\.00 KiB {re.escape(str(folders.sessions()))}", lines["sessions"])
    assert str(folders.kernels()) in lines["kernels"]
    assert "notes.txt" not in lines


def test_json_says_the_same_and_a_missing_folder_is_an_error(
    small: Path, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    convert(small, "models/")
    (folder / "models" / "small-Q8_0.gguf").rename(folder / "models" / "x.gguf")
    (found,) = report(capfd, "models")["models"]
    size = (folder / "models" / "x.gguf").stat().st_size
    assert found == {
        "path": "models/x.gguf", "files": ["models/x.gguf"], "bytes": size, "type": "Q8_0", "whole": True,
        "problem": None, "unfinished": None, "calibration": None, "working_bytes": 0, "in_use": False,
        "made_by_stepgguf": True,
    }  # fmt: skip
    assert report(capfd)["models"] == []
    own = {one["name"]: one for one in report(capfd)["folders"]}
    assert list(own) == ["sessions", "agents", "kernels", "measured errors"]
    assert own["sessions"] == {"name": "sessions", "path": str(folders.sessions()), "files": 0, "bytes": 0}
    assert main(["list", "nowhere"]) == 1
    assert capfd.readouterr().err.startswith("error: nowhere is not a folder\nhint: ")


def test_names_do_not_reach_the_terminal_as_commands(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_foreign(folder / "a\x1b[2J.gguf", "llama")
    assert main(["list"]) == 0
    out = capfd.readouterr().out
    assert "\x1b" not in out
    assert r"a\x1b[2J.gguf" in out


@pytest.mark.parametrize("name", ["x", "x.gguf", "x-00002-of-00003.gguf"])
def test_a_split_file_goes_with_its_manifests(small: Path, folder: Path, name: str) -> None:
    convert(small, "x.gguf", "--split-max-size", "5M")
    (folder / "x.gguf.report.html").write_text("mine")
    assert main(["rm", name, "--yes", "-q"]) == 0
    assert everything(folder) == ["x.gguf.report.html"]


def test_an_unfinished_file_goes_with_parts_and_journal(
    small: Path, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    convert(small, "keep.gguf")
    kept = everything(folder)
    interrupt(small, folder / "a.gguf", 60)
    interrupt(small, folder / "b.gguf", 60, split_max_size=PARTS)
    keep = (folder / "keep.gguf").rename("away")
    interrupt(small, folder / "keep.gguf", 60, mtp="separate")  # as with --overwrite
    keep.rename("keep.gguf")
    assert main(["rm", "a", "b.gguf", "--yes"]) == 0
    assert re.search(r"removed 5 files, [\d.]+ MiB\n$", capfd.readouterr().err)
    assert report(capfd)["models"][0]["unfinished"]["type"] == "Q4_K_M"
    assert everything(folder) == sorted([*kept, "keep.gguf.journal", "keep.gguf.part", "mtp-keep.gguf.part"])
    assert main(["rm", "keep", "--yes"]) == 0
    assert everything(folder) == []


def test_an_interrupted_calibration_goes_with_its_working_files(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(calibrating, "ROW_TOKENS", ROW)
    source, text = passes.checkpoint(tmp_path / "source"), write_text(tmp_path / "text.txt")
    interrupt_calibration(monkeypatch, command(source, folder / "c.gguf", text))
    (found,) = report(capfd)["models"]
    assert found["calibration"] == "c.gguf.calibration"
    assert 0 < found["unfinished"]["share"] < 1
    assert main(["list"]) == 0
    assert "calibration working files" in capfd.readouterr().out
    assert main(["rm", "c", "--yes"]) == 0
    assert everything(folder) == []


def test_it_asks_first(
    small: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    convert(small, "x.gguf")
    before = everything(folder)
    for answer in ("", "n\n", "\n", "maybe\n"):
        monkeypatch.setattr("sys.stdin", io.StringIO(answer))
        assert main(["rm", "x"]) == 1
        assert everything(folder) == before
    err = capfd.readouterr().err
    assert "  x.gguf.manifest.json\n  x.gguf\nRemove 2 files, 11." in err
    assert "nothing is removed; --yes removes without asking" in err
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    assert main(["rm", "x"]) == 0
    assert everything(folder) == []


def test_what_is_in_use_stays_and_so_does_what_is_named_with_it(
    small: Path, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    convert(small, "x.gguf")
    with running(small, folder / "now.gguf"):
        before = everything(folder)
        assert main(["rm", "x", "now", "--yes"]) == 1
        assert everything(folder) == before
    assert "error: now.gguf is in use: another stepgguf works on it\nhint: " in capfd.readouterr().err


def test_what_stepgguf_did_not_make_is_left_alone_or_named_exactly(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_foreign(folder / "foreign.gguf", "llama", tensor="output.weight")
    (folder / "text.gguf").write_text("no GGUF")
    (folder / "notes.txt").write_text("mine")
    (folder / "folder.gguf").mkdir()
    before = everything(folder)
    for name, said in (
        ("foreign", "foreign.gguf was not made by stepgguf"),
        ("text.gguf", "text.gguf is no GGUF file"),
        ("notes.txt", "notes.txt is no GGUF file"),
        ("folder.gguf", "folder.gguf is a directory"),
        (".", ". is a directory"),
        ("nothing", "nothing: there is no such file"),
        ("no/where", "no/where: there is no such file"),
    ):
        assert main(["rm", name, "--yes"]) == 1, name
        assert f"error: {said}\nhint: " in capfd.readouterr().err
    assert everything(folder) == before
    assert main(["rm", "foreign.gguf", "--yes"]) == 0
    assert "foreign.gguf" not in everything(folder)
