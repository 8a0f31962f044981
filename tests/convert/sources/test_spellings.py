"""One model in the spellings and layouts that other programs give it: the converted bytes are the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from stepgguf.cli.main import main
from stepgguf.convert.sources.checkpoint import Checkpoint
from stepgguf.convert.sources.shard_index import INDEX
from stepgguf.errors import MissingShard, ShapeMismatch, TensorNotFound, UnexpectedTensor
from stepgguf.files import gguf_header
from tests.convert.test_bytes import same_tensors
from tests.generate import Shape, write_checkpoint

pytestmark = pytest.mark.slow

State = dict[str, Tensor]
EXPERTS = ("gate_proj", "up_proj", "down_proj")


def rewrite(source: Path, dest: Path, change: Callable[[State], State]) -> Path:
    """A copy of a checkpoint with other tensors, in one shard."""
    dest.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, dest)
    (dest / "model.safetensors.index.json").unlink(missing_ok=True)
    tensors = {name: t for shard in sorted(source.glob("*.safetensors")) for name, t in load_file(shard).items()}
    save_file(change(tensors), dest / "model.safetensors")
    return dest


def converted(source: Path, dest: Path, *options: str) -> Path:
    assert main(["convert", str(source), str(dest), "--name", "x", "-q", *options]) == 0
    return dest


def by_expert(tensors: State) -> State:
    """As quantizers and Mixtral's descendants write experts, scales included."""
    result = {}
    for name, tensor in tensors.items():
        stem, _, rest = name.partition(".moe.")
        matrix, _, end = rest.partition(".")
        if matrix in EXPERTS:
            result |= {f"{stem}.moe.experts.{e}.{matrix}.{end}": tensor[e].clone() for e in range(len(tensor))}
        else:
            result[name] = tensor
    return result


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small model as BF16 and as block-FP8; experts of 256 rows, so that gate and up meet between two tiles."""
    folder = tmp_path_factory.mktemp("spellings")
    shape = Shape(n_layer=3, n_dense=1, n_mtp=1, n_expert=3)
    return {name: write_checkpoint(folder / name, shape, fp8=name == "fp8") for name in ("bf16", "fp8")}


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_experts_in_tensors_of_their_own_give_the_same_bytes(wide: dict[str, Path], tmp_path: Path, dtype: str) -> None:
    split = rewrite(wide[dtype], tmp_path / "split", by_expert)
    for name, source in (("a.gguf", wide[dtype]), ("b.gguf", split)):
        converted(source, tmp_path / name, "-t", "Q4_K_M")
    same_tensors(tmp_path / "a.gguf", tmp_path / "b.gguf")


def in_memory(tensors: State) -> State:
    """transformers' names in memory, gate above up in one tensor."""
    result = {}
    for name, tensor in tensors.items():
        head, _, rest = name.partition(".moe.")
        if rest.startswith("gate_proj."):
            end = rest.removeprefix("gate_proj.weight")
            up = tensors[name.replace("gate_proj", "up_proj")]
            both = torch.cat([part.view(torch.uint8) for part in (tensor, up)], 1)  # torch cannot join FP8
            result[f"{head}.mlp.experts.gate_up_proj{end}"] = both.view(tensor.dtype)
        elif rest.startswith("down_proj."):
            result[f"{head}.mlp.experts.down_proj{rest.removeprefix('down_proj.weight')}"] = tensor
        elif rest == "router_bias":
            result[f"{head}.mlp.gate.e_score_correction_bias"] = tensor
        elif rest == "gate.weight":
            result[f"{head}.mlp.gate.weight"] = tensor
        elif not rest.startswith("up_proj."):
            result[name.replace(".share_expert.", ".mlp.shared_experts.")] = tensor
    return {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in result.items()}


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_transformers_names_in_memory_give_the_same_bytes(wide: dict[str, Path], tmp_path: Path, dtype: str) -> None:
    held = rewrite(wide[dtype], tmp_path / "held", in_memory)
    for name, source in (("a.gguf", wide[dtype]), ("b.gguf", held)):
        converted(source, tmp_path / name, "-t", "Q4_K_M")
    same_tensors(tmp_path / "a.gguf", tmp_path / "b.gguf")


@pytest.mark.parametrize(
    "prefix", ["base_model.model.", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.base_model.model."]
)
def test_prefixes_of_wrappers_are_taken_off(wide: dict[str, Path], tmp_path: Path, prefix: str) -> None:
    wrapped = rewrite(wide["bf16"], tmp_path / "wrapped", lambda t: {prefix + name: x for name, x in t.items()})
    with Checkpoint(wrapped) as ours, Checkpoint(wide["bf16"]) as plain:
        assert ours.tensors == plain.tensors
        assert ours.hparams == plain.hparams


def test_infixes_of_wrappers_and_computed_buffers_are_taken_off(wide: dict[str, Path], tmp_path: Path) -> None:
    def wrap(tensors: State) -> State:
        wrapped = {name.replace(".self_attn", "._fsdp_wrapped_module.self_attn"): x for name, x in tensors.items()}
        return wrapped | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}

    with Checkpoint(rewrite(wide["bf16"], tmp_path / "fsdp", wrap)) as ours, Checkpoint(wide["bf16"]) as plain:
        assert ours.tensors == plain.tensors


def test_one_tensor_under_two_spellings_is_named(wide: dict[str, Path], tmp_path: Path) -> None:
    twice = rewrite(wide["bf16"], tmp_path / "twice", lambda t: t | {"module.model.norm.weight": torch.zeros(256)})
    with pytest.raises(UnexpectedTensor, match=r"model\.norm\.weight is in model\.safetensors and again in .* as "):
        Checkpoint(twice)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (
            lambda t: t.pop("model.layers.1.moe.experts.1.up_proj.weight"),
            TensorNotFound,
            r"experts\.1\.up_proj\.weight is in none of .*1 of 49 tensors",
        ),
        (
            lambda t: t.update({"model.layers.1.moe.experts.3.up_proj.weight": torch.zeros(2)}),
            UnexpectedTensor,
            r"experts\.3\.up_proj\.weight \[2\] is not a tensor",
        ),
        (
            lambda t: t.update({"model.layers.1.moe.experts.2.up_proj.weight": torch.zeros(256, 256)}),
            ShapeMismatch,
            "experts of one tensor differ",
        ),
        (
            lambda t: t.update({"model.layers.1.moe.experts.2.up_proj.weight": torch.zeros(2, 256)}),
            ShapeMismatch,
            r"shape \[2, 256\], config\.json implies \[256, 256\]",
        ),
    ],
)
def test_experts_that_do_not_fit_are_named(
    wide: dict[str, Path], tmp_path: Path, change: Callable[[State], Any], error: type[Exception], text: str
) -> None:
    def broken(tensors: State) -> State:
        split = by_expert(tensors)
        change(split)
        return split

    with pytest.raises(error, match=text):
        Checkpoint(rewrite(wide["bf16"], tmp_path / "broken", broken))


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Step-3.7 with a vision tower of one layer, as transformers loads it from the Hub."""
    path = tmp_path_factory.mktemp("hub") / "hub"
    write_checkpoint(path, Shape(n_mtp=3), spelling="3.7", index=True)
    config = json.loads((path / "config.json").read_text())
    config["vision_config"] = {"width": 32, "layers": 1, "heads": 2, "image_size": 28, "patch_size": 14}
    (path / "config.json").write_text(json.dumps(config | {"image_token_id": 5}))
    return path


@pytest.mark.parametrize("original", [True, False])
def test_what_transformers_saves_gives_the_bytes_of_what_it_loaded(
    hub: Path, tmp_path: Path, original: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    """save_pretrained rewrites config.json, drops the MTP blocks, renames the vision tower; without
    save_original_format the text tensors too."""
    from transformers import Step3p7ForConditionalGeneration

    model = Step3p7ForConditionalGeneration.from_pretrained(hub, dtype=torch.float32)
    model.save_pretrained(tmp_path / "saved", save_original_format=original)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(hub / name, tmp_path / "saved")
    capfd.readouterr()
    ours = converted(tmp_path / "saved", tmp_path / "ours.gguf", "-t", "F32")
    warnings = " ".join(capfd.readouterr().err.split())
    assert "27 tensors of the vision tower are left out" in warnings
    assert "the 3 MTP blocks that config.json names are in no shard" in warnings
    theirs = converted(hub, tmp_path / "theirs.gguf", "-t", "F32", "--mtp", "drop")
    same_tensors(ours, theirs)
    keys, expected = (gguf_header.read(path).keys for path in (ours, theirs))
    assert {k: v for k, v in keys.items() if k != "stepgguf.source"} == {
        k: v for k, v in expected.items() if k != "stepgguf.source"
    }


def test_a_text_model_without_its_head_is_named(wide: dict[str, Path], tmp_path: Path) -> None:
    def bare(tensors: State) -> State:
        return {name.removeprefix("model."): x for name, x in tensors.items() if name != "lm_head.weight"}

    with pytest.raises(TensorNotFound, match="saved without its head"):
        Checkpoint(rewrite(wide["bf16"], tmp_path / "bare", bare))


def test_experts_in_a_shard_that_is_not_there_name_the_shard(wide: dict[str, Path], tmp_path: Path) -> None:
    split = rewrite(wide["bf16"], tmp_path / "split", by_expert)
    tensors = load_file(split / "model.safetensors")
    gone = {name: "model-2.safetensors" for name in tensors if ".experts.2." in name}
    save_file({name: x for name, x in tensors.items() if name not in gone}, split / "model.safetensors")
    weight_map = dict.fromkeys(tensors, "model.safetensors") | gone
    (split / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(MissingShard, match=r"model-2\.safetensors is missing; 6 of \d+ tensors are missing"):
        Checkpoint(split)
