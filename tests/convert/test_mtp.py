"""Which MTP tensors are needed follows from what is there and what is asked for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from stepgguf.cli.main import main
from stepgguf.convert.sources.checkpoint import Checkpoint
from stepgguf.convert.sources.shard_index import INDEX
from stepgguf.errors import MissingShard, ShapeMismatch, TensorNotFound, UnexpectedTensor
from stepgguf.files import gguf_header
from tests.convert.test_bytes import same_tensors

pytestmark = pytest.mark.slow

N_LAYER, N_MTP = 5, 3  # of the generated model
MTP = tuple(f"model.layers.{N_LAYER + i}." for i in range(N_MTP))
State = dict[str, torch.Tensor]


@pytest.fixture
def copy(small: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small, tmp_path / "copy"))


def edit(path: Path, change: Callable[[State], Any]) -> None:
    for shard in path.glob("*.safetensors"):
        tensors = load_file(shard)
        change(tensors)
        save_file(tensors, shard)


def configure(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


def drop(tensors: State, *prefixes: str) -> None:
    for name in [name for name in tensors if name.startswith(prefixes)]:
        del tensors[name]


def convert(source: Path, dest: Path, *options: str) -> int:
    return main(["convert", str(source), str(dest), "-t", "Q8_0", "--name", "x", "-q", *options])


@pytest.fixture(scope="module")
def trunk(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole checkpoint converted with --mtp drop."""
    path = tmp_path_factory.mktemp("trunk") / "trunk.gguf"
    assert convert(small, path, "--mtp", "drop") == 0
    return path


def is_trunk(path: Path, trunk: Path) -> None:
    """The same tensors, and metadata that knows of no MTP blocks."""
    same_tensors(path, trunk)
    header = gguf_header.read(path)
    assert header.get("step35.block_count") == N_LAYER
    assert "step35.nextn_predict_layers" not in header.keys
    for name in ("attention.head_count", "attention.head_count_kv", "attention.sliding_window_pattern"):
        assert len(header.get(f"step35.{name}")) == N_LAYER
    for name in ("swiglu_clamp_exp", "swiglu_clamp_shexp"):
        assert len(header.get(f"step35.{name}")) == N_LAYER


def strip(path: Path) -> None:
    edit(path, lambda tensors: drop(tensors, *MTP))


@pytest.mark.parametrize("options", [(), ("--mtp", "separate"), ("--mtp", "drop")])
@pytest.mark.parametrize("n_mtp", [N_MTP, 0])
def test_a_checkpoint_without_mtp_tensors_is_converted_without_them(
    copy: Path, trunk: Path, tmp_path: Path, options: tuple[str, ...], n_mtp: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """As transformers saves it, and as merges write it: num_nextn_predict_layers 0, lists as long as before."""
    strip(copy)
    configure(copy, num_nextn_predict_layers=n_mtp)
    assert convert(copy, tmp_path / "out.gguf", *options) == 0
    is_trunk(tmp_path / "out.gguf", trunk)
    assert not (tmp_path / "mtp-out.gguf").exists()
    warned = "the 3 MTP blocks that config.json names are in no shard" in " ".join(capfd.readouterr().err.split())
    assert warned == (n_mtp > 0 and options != ("--mtp", "drop"))


def test_mtp_tensors_that_config_json_does_not_name_are_left_out(copy: Path, trunk: Path, tmp_path: Path) -> None:
    configure(copy, num_nextn_predict_layers=0)
    with Checkpoint(copy) as checkpoint:
        assert checkpoint.warnings == ["config.json names no MTP blocks; 51 tensors of such are left out"]
    assert convert(copy, tmp_path / "out.gguf") == 0
    is_trunk(tmp_path / "out.gguf", trunk)


def grow(path: Path) -> None:
    """Twelve new tokens; the MTP heads keep their own old matrices."""
    configure(path, vocab_size=780)

    def change(tensors: State) -> None:
        for name in tensors.keys() & {"lm_head.weight", "model.embed_tokens.weight"}:
            tensors[name] = torch.cat([tensors[name], tensors[name][:12]])

    edit(path, change)


def cut(path: Path) -> None:
    edit(path, lambda tensors: tensors.pop(MTP[1] + "eh_proj.weight", None))


def lose_a_block(path: Path) -> None:
    edit(path, lambda tensors: drop(tensors, MTP[2]))


def add_a_stranger(path: Path) -> None:
    edit(
        path,
        lambda tensors: (
            tensors.update({MTP[0] + "x.weight": torch.zeros(2)}) if MTP[0] + "enorm.weight" in tensors else None
        ),
    )


def forget_a_shard(path: Path) -> None:
    """The index names a shard with the MTP blocks; it was not downloaded."""
    strip(path)
    names = {name: shard.name for shard in path.glob("*.safetensors") for name in load_file(shard)}
    names |= {prefix + "enorm.weight": "model-mtp.safetensors" for prefix in MTP}
    (path / INDEX).write_text(json.dumps({"weight_map": names}))


FAULTS: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "grown vocabulary": (grow, ShapeMismatch, r"shared_head\.output\.weight has shape \[768, 256\], .* \[780, 256\]"),
    "a tensor lost": (cut, TensorNotFound, r"model\.layers\.6\.eh_proj\.weight is in none of"),
    "a block lost": (lose_a_block, TensorNotFound, r"17 of 51 tensors are missing"),
    "a stranger": (add_a_stranger, UnexpectedTensor, r"model\.layers\.5\.x\.weight \[2\] is not a tensor"),
    "a shard lost": (forget_a_shard, MissingShard, r"model-mtp\.safetensors is missing"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_mtp_blocks_that_cannot_be_used_are_refused_only_where_they_are_asked_for(
    copy: Path, tmp_path: Path, fault: str, capfd: pytest.CaptureFixture[str]
) -> None:
    change, error, text = FAULTS[fault]
    change(copy)
    with Checkpoint(copy) as checkpoint, pytest.raises(error, match=f"the MTP blocks cannot be used: .*{text}"):
        checkpoint.require_mtp()
    for options in ((), ("--mtp", "separate")):
        assert convert(copy, tmp_path / "out.gguf", *options) == 1
        assert "--mtp drop" in capfd.readouterr().err
    assert not list(tmp_path.glob("out.gguf*"))
    assert convert(copy, tmp_path / "out.gguf", "--mtp", "drop") == 0
    assert gguf_header.read(tmp_path / "out.gguf").get("step35.block_count") == N_LAYER
    assert "MTP" not in capfd.readouterr().err
    assert main(["verify", str(tmp_path / "out.gguf"), "--against", str(copy), "-q"]) == 0
    assert main(["inspect", str(copy)]) == 0
    assert main(["plan", str(copy), "--machine", "spark"]) == 0
    assert "the MTP blocks cannot be used" in " ".join(capfd.readouterr().err.split())


def test_per_layer_lists_may_be_longer_only_where_there_are_no_mtp_blocks(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    configure(copy, layer_types=[*config["layer_types"], "sliding_attention"])
    assert main(["inspect", str(copy)]) == 1
