"""A folder that cannot be converted is named for what it is, with the one thing to do."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from stepgguf.cli.main import main
from stepgguf.convert.sources.checkpoint import Checkpoint
from stepgguf.convert.sources.diagnosis import QUANTIZED
from stepgguf.convert.sources.random_access import LocalFile
from stepgguf.convert.sources.shard_index import INDEX
from stepgguf.errors import CheckpointError, MissingShard, StepggufError, UnsupportedCheckpoint
from stepgguf.model.hparams import HParams
from stepgguf.model.tensors import tensor_specs
from tests.convert.sources.test_spellings import by_expert
from tests.generate import Shape, config

pytestmark = pytest.mark.slow

STEM = "model.layers.3.moe.experts.0.gate_proj"
ORIGINAL = "Convert the checkpoint that it was made from"
MERGE = "merge_and_unload"
SAVE = "save it as safetensors"


@pytest.fixture
def copy(small: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small, tmp_path / "copy"))


def files(path: Path, *names: str, keep: tuple[str, ...] = ()) -> None:
    """Only these files, each with a line of text, and those to keep."""
    for file in path.iterdir():
        if file.name not in keep:
            file.unlink()
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text("{}\n")


def weights(
    path: Path, suffixes: dict[str, torch.Tensor], metadata: dict[str, str] | None = None, **settings: Any
) -> None:
    """One expert's matrix as another tool stores it: a tensor for each suffix; `settings`: quantization_config."""
    tensors = load_file(path / "model-00001.safetensors")
    for name in [name for name in tensors if ".moe." in name and "_proj" in name]:
        del tensors[name]
    save_file(tensors | {STEM + s: t for s, t in suffixes.items()}, path / "model-00001.safetensors", metadata=metadata)
    if settings:
        whole = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(whole | {"quantization_config": settings}))


def packed(*suffixes: str, dtype: torch.dtype = torch.int32) -> dict[str, torch.Tensor]:
    return {suffix: torch.zeros(2, 2, dtype=dtype) for suffix in suffixes}


def adapter(path: Path) -> None:
    (path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "stepfun-ai/Step-3.5-Flash"}))
    save_file(
        {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(2, 2)},
        path / "adapter_model.safetensors",
    )


def adapter_alone(path: Path) -> None:
    files(path)
    adapter(path)


def foreign_shard(path: Path, start: bytes) -> None:
    (path / "model-00001.safetensors").write_bytes(start + bytes(100))


def broken_links(path: Path) -> None:
    for shard in path.glob("*.safetensors"):
        shard.unlink()
        shard.symlink_to(path / "blobs" / "gone")


CONFIG = ("config.json", "tokenizer.json", "tokenizer_config.json")
KINDS: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    # adapters
    "a LoRA folder": (adapter_alone, "is a LoRA adapter", rf"base \(stepfun-ai/Step-3\.5-Flash\) .*{MERGE}"),
    "an adapter as .bin": (lambda p: files(p, "adapter_model.bin"), "is a LoRA adapter", MERGE),
    "an adapter beside its base": (adapter, "holds a LoRA adapter .* beside its base", r"move adapter_\* away"),
    "an adapter not merged": (
        lambda p: weights(p, packed(".lora_A.default.weight", ".base_layer.weight")),
        "a LoRA adapter that is not merged",
        MERGE,
    ),
    # other tools' quantizations
    "NVFP4, ModelOpt": (
        lambda p: weights(p, packed(".weight", ".weight_scale", ".weight_scale_2"), quant_method="modelopt"),
        r"is an NVFP4 checkpoint \(ModelOpt\)",
        ORIGINAL,
    ),
    "NVFP4, compressed-tensors": (
        lambda p: weights(p, packed(".weight_packed", ".weight_scale", ".weight_global_scale")),
        r"is an NVFP4 checkpoint \(compressed-tensors\)",
        ORIGINAL,
    ),
    "compressed-tensors": (
        lambda p: weights(p, packed(".weight_packed", ".weight_scale", ".weight_shape"), format="pack-quantized"),
        r"is a compressed-tensors checkpoint \(pack-quantized\)",
        ORIGINAL,
    ),
    "FP8 by channel": (
        lambda p: weights(p, packed(".weight", dtype=torch.float8_e4m3fn) | packed(".weight_scale")),
        "is an FP8 or INT8 checkpoint with scales of channels",
        ORIGINAL,
    ),
    "AWQ": (
        lambda p: weights(p, packed(".qweight", ".qzeros", ".scales"), quant_method="awq"),
        "is an AWQ checkpoint",
        ORIGINAL,
    ),
    "GPTQ": (
        lambda p: weights(p, packed(".qweight", ".qzeros", ".scales", ".g_idx"), quant_method="gptq"),
        "is a GPTQ checkpoint",
        ORIGINAL,
    ),
    "AutoRound": (
        lambda p: weights(p, packed(".qweight", ".qzeros", ".scales"), quant_method="auto-round"),
        "is an AutoRound checkpoint",
        ORIGINAL,
    ),
    "bitsandbytes": (
        lambda p: weights(p, packed(".weight", ".weight.absmax", ".weight.quant_state.bitsandbytes__nf4")),
        "is a bitsandbytes checkpoint",
        ORIGINAL,
    ),
    "bitsandbytes, 8 bits": (
        lambda p: weights(p, packed(".weight", ".SCB", dtype=torch.int8)),
        "is a bitsandbytes checkpoint",
        ORIGINAL,
    ),
    "MLX, quantized": (
        lambda p: weights(p, packed(".weight", ".scales", ".biases")),
        "is an MLX checkpoint",
        ORIGINAL,
    ),
    "MLX, not quantized": (lambda p: weights(p, {}, {"format": "mlx"}), "is an MLX checkpoint", ORIGINAL),
    "MXFP4": (lambda p: weights(p, packed("_blocks", "_scales")), "is an MXFP4 checkpoint", ORIGINAL),
    "EXL3": (lambda p: weights(p, packed(".trellis", ".suh")), "is an EXL3 checkpoint", ORIGINAL),
    "a method that is not known": (
        lambda p: weights(p, packed(".weight"), quant_method="quanto"),
        "is quantized by quanto: .*gate_proj.weight is I32",
        ORIGINAL,
    ),
    # other formats, and none
    ".bin": (
        lambda p: files(p, "pytorch_model-00001-of-00002.bin", "training_args.bin", keep=CONFIG),
        r"holds PyTorch pickles \(\.bin\)",
        SAVE,
    ),
    ".pth": (lambda p: files(p, "consolidated.00.pth", keep=CONFIG), r"holds PyTorch pickles \(\.pth\)", SAVE),
    "ONNX": (lambda p: files(p, "model.onnx", "model.onnx_data", keep=CONFIG), "is an ONNX export", ORIGINAL),
    "diffusers": (
        lambda p: files(p, "model_index.json", "unet/config.json", "vae/config.json"),
        "is a diffusers pipeline",
        ORIGINAL,
    ),
    "GGUFs": (lambda p: files(p, "a-Q4_K_S.gguf", "README.md"), "holds GGUF files", r"a-Q4_K_S\.gguf"),
    "a distributed state": (lambda p: files(p, "__0_0.distcp"), "is a distributed training state", SAVE),
    "DeepSpeed": (lambda p: files(p, "zero_to_fp32.py", "latest"), "is a DeepSpeed training state", "zero_to_fp32"),
    "a tokenizer": (
        lambda p: files(p, "special_tokens_map.json", keep=CONFIG[1:]),
        "holds a tokenizer without a model",
        "config.json and the",
    ),
    "an empty folder": (lambda p: files(p), "is empty", "hf download"),
    "a config alone": (lambda p: files(p, keep=CONFIG), r"there is no \*\.safetensors in it", "config.json and the"),
    "the parent": (
        lambda p: files(p, "checkpoint-500/config.json", "checkpoint-500/model.safetensors"),
        "other directories do: checkpoint-500",
        "copy/checkpoint-500",
    ),
    # half downloaded
    "only the index": (lambda p: files(p, INDEX, keep=CONFIG), r"has not finished \(only the index", "hf download"),
    "incomplete": (
        lambda p: files(p, ".cache/huggingface/download/model-1.abc.incomplete", keep=CONFIG),
        r"has not finished \(model-1\.abc\.incomplete is half there\)",
        "hf download",
    ),
    "incomplete beside others": (
        lambda p: files(p, "model-00002.safetensors.aria2", keep=(*CONFIG, "model-00001.safetensors")),
        "its download has not finished",
        "hf download",
    ),
    "broken links": (broken_links, "a link to a file that is not there", "Download the shard again"),
    "git-lfs": (
        lambda p: foreign_shard(p, b"version https://git-lfs.github.com/spec/v1\n"),
        "is a git-lfs pointer",
        "git lfs pull",
    ),
    "git-lfs config": (
        lambda p: (p / "config.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n"),
        "is a git-lfs pointer",
        "git lfs pull",
    ),
    "a web page": (lambda p: foreign_shard(p, b"<!DOCTYPE html>"), "is a web page", "Download the shard again"),
    "a renamed pickle": (lambda p: foreign_shard(p, b"PK\x03\x04"), "is a PyTorch pickle", "save_pretrained"),
    "a renamed GGUF": (lambda p: foreign_shard(p, b"GGUF"), "is a GGUF file", "right name"),
    "preallocated": (lambda p: foreign_shard(p, bytes(8)), "begins with zeros", "Finish the download"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_is_named_for_what_it_is(copy: Path, kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    make, what, hint = KINDS[kind]
    make(copy)
    with pytest.raises(StepggufError, match=what) as caught:
        Checkpoint(copy)
    assert str(copy) in caught.value.message
    assert re.search(hint, caught.value.hint or "")
    for command in (["convert", str(copy), str(copy / "x.gguf")], ["inspect", str(copy)], ["plan", str(copy)]):
        assert main(command) == 1
        assert "hint:" in capfd.readouterr().err


@pytest.mark.parametrize("spoil", [lambda p: (p / "._model-00001.safetensors").write_bytes(b"\0\5\x16\7"),
                                   lambda p: (p / "training_args.bin").write_bytes(b"PK"),
                                   lambda p: (p / "model.onnx").write_bytes(b"x"),
                                   lambda p: weights_config(p)])  # fmt: skip
def test_what_lies_beside_a_whole_checkpoint_does_no_harm(copy: Path, spoil: Callable[[Path], Any]) -> None:
    spoil(copy)
    Checkpoint(copy).close()


def weights_config(path: Path) -> None:
    """What dequantizing leaves in config.json."""
    whole = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(whole | {"quantization_config": {"quant_method": "gptq"}}))


def test_shards_that_the_others_numbers_tell_of_are_missing(copy: Path) -> None:
    for i in (1, 2):
        (copy / f"model-0000{i}.safetensors").rename(copy / f"model-0000{i}-of-00004.safetensors")
    (copy / "model-00002-of-00004.safetensors").unlink()
    with pytest.raises(MissingShard, match=r"model-00002-of-00004\.safetensors is missing and 2 more shards"):
        Checkpoint(copy)


@pytest.mark.parametrize("name", ["model-00001.safetensors", "config.json", "README.md"])
def test_pipes_in_the_place_of_files_do_not_wait_for_ever(copy: Path, name: str) -> None:
    (copy / name).unlink(missing_ok=True)
    os.mkfifo(copy / name)
    if name == "README.md":
        assert main(["convert", str(copy), str(copy / "x.gguf"), "-t", "Q8_0", "-q", "--dry-run"]) == 0
    else:
        with pytest.raises(CheckpointError, match=rf"{name}: not a file"):
            Checkpoint(copy)
    os.mkfifo(copy / "x.gguf")
    assert main(["inspect", str(copy / "x.gguf")]) == 1


@pytest.mark.parametrize("name", ["/dev/null", "x" * 300, "nowhere", "nowhere/at/all"])
def test_a_path_that_leads_nowhere_is_an_error(name: str) -> None:
    with pytest.raises(CheckpointError):
        Checkpoint(Path(name))


def test_a_gguf_given_as_a_checkpoint_names_quantize(demo_gguf: Path) -> None:
    with pytest.raises(UnsupportedCheckpoint, match="is a GGUF file") as caught:
        Checkpoint(demo_gguf)
    assert f"stepgguf quantize {demo_gguf}" in (caught.value.hint or "")


@pytest.mark.parametrize("name", ["config.json", "model-00002.safetensors"])
def test_a_checkpoint_may_be_given_by_one_of_its_files(small: Path, name: str) -> None:
    with Checkpoint(small / name) as checkpoint:
        assert checkpoint.path == small


BAD_NAMES = [
    7,
    None,
    True,
    ["x"],
    "",
    "x" * 300,
    "é" * 200,
    "../x.safetensors",
    "/etc/passwd",
    "a/b",
    ".",
    "..",
    "a\0b",
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_an_index_with_what_is_no_files_name_is_named(copy: Path, name: Any) -> None:
    (copy / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(CheckpointError, match=rf"{INDEX}: weight_map\.model\.norm\.weight is "):
        Checkpoint(copy)


def test_the_tables_patterns_match_nothing_of_a_good_checkpoint() -> None:
    """Names of published and per-expert checkpoints pass all rows."""
    specs = tensor_specs(HParams.from_config(config(Shape(n_mtp=3))))
    names = {spec.source: torch.zeros(2, 1) for spec in specs}
    for name in [*names, *by_expert(names), *(f"{n}_scale_inv" for n in names)]:
        assert not [pattern for pattern, _ in QUANTIZED if re.search(pattern, name)]


def test_a_shard_that_may_not_be_read_need_not_be_downloaded_again(copy: Path) -> None:
    shard = copy / "model-00001.safetensors"
    with tempfile.TemporaryDirectory() as open_to_all:
        moved = shard.rename(Path(open_to_all) / shard.name)
        moved.chmod(0)
        os.chmod(open_to_all, 0o755)
        user = os.geteuid()
        try:
            if user == 0:  # root may read everything
                os.seteuid(65534)
            with pytest.raises(CheckpointError, match="Permission denied") as caught:
                LocalFile(moved)
        finally:
            os.seteuid(user)
    assert caught.value.hint == "Check its permissions."
