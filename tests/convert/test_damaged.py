"""A damaged source is refused by tensor, expert and row, and never quantized on."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import numpy as np
import pytest

from stepgguf.cli.main import main
from stepgguf.files import gguf_header
from stepgguf.quants.types import quant_type, row_size

pytestmark = pytest.mark.slow

TENSOR, EXPERT, ROW = "blk.3.ffn_down_exps.weight", 4, 17
TYPES = ["F32", "F16", "BF16", "Q8_0", "Q4_K_S", "IQ4_XS", "TQ2_0"]


@pytest.fixture(scope="module")
def sources(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    for name in TYPES:
        assert main(["convert", str(small), str(folder / f"{name}.gguf"), "-t", name, "--mtp", "drop", "-q"]) == 0
    return folder


def damage(path: Path, value: float) -> str:
    """Make a value, or a block's factor, of one row of one expert a number that is none. Returns the tensor's type."""
    header = gguf_header.read(path)
    info = next(tensor for tensor in header.tensors if tensor.name == TENSOR)
    type_name = info.ggml_type.name
    at = header.data_start + info.offset + (EXPERT * info.shape[1] + ROW) * row_size(info.ggml_type, info.shape[2])
    if type_name in ("F32", "BF16"):
        data = struct.pack("<f", value)[4 - {"F32": 4, "BF16": 2}[type_name] :]
    else:
        at += (quant_type(info.ggml_type).factors or {"F16": (0,), "TQ2_0": (64,)}[type_name])[0]
        data = np.float16(value).tobytes()
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)
    return type_name


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", TYPES)
def test_a_damaged_gguf_is_refused_by_tensor_expert_and_row(
    sources: Path, tmp_path: Path, name: str, value: float, capfd: pytest.CaptureFixture[str]
) -> None:
    """Both where the tensor is quantized to another type and where its blocks are copied."""
    source = tmp_path / "damaged.gguf"
    source.write_bytes((sources / f"{name}.gguf").read_bytes())
    type_name = damage(source, value)
    for target in ("Q5_K", type_name):
        recipe = tmp_path / "recipe.toml"
        recipe.write_text(f'default = "F16"\nffn_down_exps = "{target}"\n')
        command = ["quantize", str(source), str(tmp_path / "out.gguf"), "-t", str(recipe), "--allow-requantize"]
        assert main([*command, "--restart", "-q"]) == 1
        error = " ".join(capfd.readouterr().err.split())
        assert f"{TENSOR}: expert {EXPERT}, row {ROW}, column " in error
        assert not (tmp_path / "out.gguf").exists()
