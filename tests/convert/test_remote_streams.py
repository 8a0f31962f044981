"""Models on the Hub that are run layer by layer, as eval and imatrix do: what they give is the local model's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from stepgguf.cli.main import main
from stepgguf.demo import CHECKPOINT
from tests.convert.hub_server import HUB_ID, Hub, serving, set_endpoint

pytest.importorskip("torch")
pytestmark = pytest.mark.slow

ADDRESS = f"hf:{HUB_ID}"


@pytest.fixture
def demo_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The embedded model, which has a tokenizer."""
    with serving(Hub(CHECKPOINT)) as served:
        set_endpoint(monkeypatch, served.url)
        yield served


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("Hello there, how are you? " * 40)
    return path


def test_a_file_of_the_same_weights_does_not_diverge_from_the_original_on_the_hub(
    demo_hub: Hub, demo_gguf: Path, text: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ["--text", str(text), "--ctx", "32", "--chunks", "7", "--engine", "stream", "--json", "-q"]
    assert main(["eval", str(demo_gguf), "--against", ADDRESS, *options]) == 0
    figures = json.loads(capfd.readouterr().out)
    assert figures["against"] == ADDRESS
    assert [column["same_top"]["value"] for column in figures["columns"]] == [1.0, 1.0]
    half_a_code = 16 / 65535 / 2  # by which a model differs from itself: coded_rows.py
    assert all(abs(column["kld"]["value"]) < half_a_code for column in figures["columns"])


def test_an_importance_matrix_is_the_local_models(demo_hub: Hub, text: Path, tmp_path: Path) -> None:
    for source, name in ((ADDRESS, "hub.gguf"), (str(CHECKPOINT), "local.gguf")):
        assert main(["imatrix", source, str(text), "-o", str(tmp_path / name), "--chunk", "32", "-q"]) == 0
    assert (tmp_path / "hub.gguf").read_bytes() == (tmp_path / "local.gguf").read_bytes()
