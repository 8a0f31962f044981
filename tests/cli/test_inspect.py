"""inspect says what a file holds, whatever it is."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest

from stepgguf.cli.main import main
from stepgguf.files import gguf_header


def shown(path: Path, capfd: pytest.CaptureFixture[str]) -> str:
    """What inspect prints, and that its JSON holds the same sentence."""
    assert main(["inspect", str(path)]) == 0
    text = capfd.readouterr().out
    assert main(["inspect", str(path), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["contents"] in text
    return text


def write(path: Path, architecture: str, kind: str | None = None, *, tensor: str | None = None) -> Path:
    """A small GGUF by gguf-py."""
    writer = gguf.GGUFWriter(path, architecture)
    if kind is not None:
        writer.add_type(kind)
    if tensor is not None:
        writer.add_tensor(tensor, np.zeros((2, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.slow
def test_the_files_of_a_separate_conversion(small: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    dest = tmp_path / "x.gguf"
    assert main(["convert", str(small), str(dest), "-t", "Q8_0", "--mtp", "separate", "-q"]) == 0
    assert "5 layers and no MTP blocks" in shown(dest, capfd)
    heads = shown(tmp_path / "mtp-x.gguf", capfd)
    assert "3 MTP blocks alone, to be used with the file that holds the model's layers" in heads
    assert "blk.5-7 nextn.eh_proj" in heads


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "kind", "tensor", "text"),
    [
        ("step35", None, None, "metadata alone: no tensors\n0 tensors, 0.000 B values"),
        ("step35", "model", "output.weight", "no layers and no MTP blocks"),
        ("llama", "model", "blk.0.attn_q.weight", "architecture llama; stepgguf quantizes and runs step35 alone"),
        ("llama", None, None, "a model of architecture llama"),
        ("clip", "mmproj", "v.patch_embd.weight", "a GGUF of type mmproj, which is no model that runs alone"),
        ("step35", "adapter", "blk.0.attn_q.weight.lora_a", "a GGUF of type adapter"),
    ],
)  # fmt: skip
def test_other_files_are_described(
    tmp_path: Path,
    architecture: str,
    kind: str | None,
    tensor: str | None,
    text: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert text in shown(write(tmp_path / "x.gguf", architecture, kind, tensor=tensor), capfd)


def test_a_file_without_a_key_is_described(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.gguf").write_bytes(gguf_header.encode([], []))
    assert "a model of architecture None" in shown(tmp_path / "x.gguf", capfd)


def test_control_characters_of_a_file_do_not_reach_the_terminal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "step35")
    writer.add_string("general.name", "a\x1b]0;title\x07b\nc")
    writer.add_array("general.tags", ["\x1b[2J"] * 20)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    text = shown(tmp_path / "x.gguf", capfd)
    assert r"a\x1b]0;title\x07b\nc" in text
    assert "\x1b" not in text


def test_a_checkpoint_is_described(small: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = shown(small, capfd)
    assert "a checkpoint of 5 layers and 3 MTP blocks" in text
    assert text.startswith("name                small\n")
