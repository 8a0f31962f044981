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
    tensors = json.loads(manifest_path(gguf).read_text())["tensors"]
    errors = [entry["ledger"]["error"] for name, entry in tensors.items() if "_exps" in name]
    assert found["worst"][0]["error"] == max(max(error) for error in errors)
    assert len(found["worst"]) == 20


def test_a_file_without_a_manifest_is_two_lines(gguf: Path, capfd: pytest.CaptureFixture[str]) -> None:
    manifest_path(gguf).unlink()
    assert main(["report", str(gguf)]) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith(f"error: {manifest_path(gguf)} is not there")
    assert "hint: `stepgguf convert` and `quantize` write it beside the file" in err
    assert not gguf.with_name("step.gguf.report.html").exists()


def test_a_place_that_cannot_be_written_is_named(gguf: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(gguf), "-o", str(gguf.parent / "nowhere" / "x.html")]) == 1
    assert "x.html: No such file or directory\nhint: " in capfd.readouterr().err
