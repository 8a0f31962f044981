"""stepgguf report as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stepgguf.cli.main import main
from stepgguf.convert.manifest import manifest_path
from tests.generate import Shape, config
from tests.report.synthetic import write

MODEL = config(Shape(n_expert=12))


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    return write(tmp_path / "step.gguf", MODEL, "Q4_K_M").path


def test_the_page_lies_beside_the_file_and_is_named(gguf: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(gguf)]) == 0
    page = gguf.with_name("step.gguf.report.html")
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith(f"wrote {page} (")
    assert page.read_text().startswith("<!doctype html>")


def test_an_existing_page_is_replaced_only_when_asked(gguf: Path, capfd: pytest.CaptureFixture[str]) -> None:
    page = gguf.with_name("index.html")
    page.write_text("mine")
    assert main(["report", str(gguf), "-o", str(page)]) == 1
    assert page.read_text() == "mine"
    assert f"error: {page} exists\nhint: " in capfd.readouterr().err
    assert main(["report", str(gguf), "-o", str(page), "--overwrite", "-q"]) == 0
    assert page.read_text() != "mine"
    assert capfd.readouterr().err == ""


def test_json_is_the_summary(gguf: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(gguf), "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["page"] == str(gguf.with_name("step.gguf.report.html"))
    assert found["bytes"] < gguf.stat().st_size
    assert found["levels"].keys() == {"Q4_K", "Q6_K"}
    assert found["stands_out"] == {"sigmas": 5.0, "times": 1.5}
    assert len(found["worst"]) == found["n_worst"]
    assert all(expert["ratio"] >= 1.5 for expert in found["worst"])


def test_a_file_without_a_manifest_has_types_and_sizes(gguf: Path, capfd: pytest.CaptureFixture[str]) -> None:
    manifest_path(gguf).unlink()
    assert main(["report", str(gguf), "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert (found["type"], found["errors"], found["worst"]) == ("Q4_K_M", [], [])
    assert "no manifest beside the file" in found["missing"][0]


def test_a_file_with_a_damaged_manifest_is_two_lines(gguf: Path, capfd: pytest.CaptureFixture[str]) -> None:
    manifest_path(gguf).write_text("{")
    assert main(["report", str(gguf)]) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith(f"error: {manifest_path(gguf)}: not valid JSON")
    assert "hint: Fetch the manifest again, or remove it" in err
    assert not gguf.with_name("step.gguf.report.html").exists()


def test_a_place_that_cannot_be_written_is_named(gguf: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(gguf), "-o", str(gguf.parent / "nowhere" / "x.html")]) == 1
    assert "x.html: No such file or directory\nhint: " in capfd.readouterr().err
