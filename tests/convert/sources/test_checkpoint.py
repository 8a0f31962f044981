"""Every way in which a checkpoint can be wrong, found before a value is read, and named."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from stepgguf.convert.sources.checkpoint import Checkpoint
from stepgguf.convert.sources.shard_index import INDEX
from stepgguf.errors import (
    BadConfig,
    CheckpointError,
    CorruptShard,
    MissingShard,
    ShapeMismatch,
    StepggufError,
    TensorNotFound,
    TruncatedShard,
    UnexpectedTensor,
    UnsupportedCheckpoint,
)
from stepgguf.quants.values import widen

FIRST = "model-00001.safetensors"


@pytest.fixture
def copy(small: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small, tmp_path / "copy"))


@pytest.fixture
def copy_fp8(small_fp8: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_fp8, tmp_path / "copy"))


def edit(path: Path, change: Callable[[dict[str, torch.Tensor]], Any], shard: str = FIRST) -> None:
    tensors = load_file(path / shard)
    change(tensors)
    save_file(tensors, path / shard)


def test_values_are_those_that_safetensors_reads(small: Path) -> None:
    with Checkpoint(small) as checkpoint:
        for shard in sorted(small.glob("*.safetensors")):
            with safe_open(shard, "pt") as theirs:
                for name in theirs.keys():  # noqa: SIM118  not a mapping
                    expected = theirs.get_tensor(name).float().numpy()
                    rows = expected.reshape(-1, expected.shape[-1])
                    out = np.empty_like(rows)
                    widen(checkpoint.values(name, 0, len(rows)), out)
                    np.testing.assert_array_equal(out, rows)


def test_fp8_values_are_torchs_times_the_scale_of_their_block(small_fp8: Path) -> None:
    with Checkpoint(small_fp8) as checkpoint:
        for shard in sorted(small_fp8.glob("*.safetensors")):
            tensors = load_file(shard)
            for name, tensor in tensors.items():
                if tensor.dtype != torch.float8_e4m3fn:
                    continue
                scale = tensors[name + "_scale_inv"].repeat_interleave(128, 1).repeat_interleave(128, 2)
                expected = (tensor.float() * scale).numpy()
                n, height, width = expected.shape
                for expert, start in ((0, 0), (n - 1, 100)):
                    out = np.empty((height - start, width), np.float32)
                    widen(checkpoint.values(name, expert * height + start, (expert + 1) * height), out)
                    np.testing.assert_array_equal(out, expected[expert, start:])


def test_the_stale_fp8_index_is_a_warning_that_names_both(small_fp8: Path) -> None:
    with Checkpoint(small_fp8) as checkpoint:
        (warning,) = checkpoint.warnings
    assert INDEX in warning
    assert "9 tensors" in warning
    assert "index: not listed, headers: model-0000" in warning


def test_the_3_7_spelling_and_its_vision_tower(small: Path, copy: Path) -> None:
    from tests.generate import nested

    flat = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(nested(flat)))
    save_file({"vision_model.conv1.weight": torch.zeros(2, 3)}, copy / "model-vit-00001.safetensors")
    with Checkpoint(copy) as checkpoint, Checkpoint(small) as plain:
        assert checkpoint.specs == plain.specs
        assert checkpoint.hparams.architecture == "Step3p7ForConditionalGeneration"
        assert checkpoint.warnings == ["1 tensors of the vision tower are left out; the text model is converted"]


@pytest.mark.parametrize("order", ["names", "reversed", "one shard"])
def test_shards_may_have_any_names_and_order(small: Path, tmp_path: Path, order: str) -> None:
    everything = {k: v for shard in sorted(small.glob("*.safetensors")) for k, v in load_file(shard).items()}
    names = sorted(everything, reverse=order == "reversed")
    parts = [names] if order == "one shard" else [names[::3], names[1::3], names[2::3]]
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(small / name, tmp_path)
    for i, part in enumerate(parts):
        save_file({name: everything[name] for name in part}, tmp_path / f"piece {i}.safetensors")
    with Checkpoint(tmp_path) as checkpoint, Checkpoint(small) as plain:
        assert checkpoint.tensors == plain.tensors


def wrong_index(path: Path) -> None:
    (path / "model-00002.safetensors").unlink()
    (path / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": "model-00002.safetensors"}}))


def rewrite_header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = (path / FIRST).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    (path / FIRST).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def first(path: Path, content: bytes) -> None:
    (path / FIRST).write_bytes(content)


def cut(path: Path, end: int) -> None:
    first(path, (path / FIRST).read_bytes()[:end])


def header_of(path: Path, text: bytes) -> None:
    first(path, struct.pack("<Q", len(text)) + text)


def overlap(header: dict[str, Any]) -> None:
    header[next(k for k in header if k != "__metadata__")]["data_offsets"] = [2, 4]


def replace_q(path: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    edit(path, lambda t: t.update({k: change(v) for k, v in t.items() if "q_proj" in k}))


def add(path: Path, name: str) -> None:
    edit(path, lambda t: t.update({name: torch.zeros(2)}))


Q_SHAPE = r"q_proj\.weight has shape \[\d+, 256\], config\.json implies \[\d+, 256\]"
DAMAGE: dict[str, tuple[Callable[[Path], Any], type[StepggufError], str]] = {
    "no directory": (shutil.rmtree, CheckpointError, "no such file or directory"),
    "no config": (lambda p: (p / "config.json").unlink(), BadConfig, r"config\.json: No such file"),
    "config garbage": (lambda p: (p / "config.json").write_text("{"), BadConfig, "not valid JSON"),
    "config a list": (
        lambda p: (p / "config.json").write_text("[]"),
        BadConfig,
        "is a list of 0, expected a JSON object",
    ),
    "no shards": (
        lambda p: [s.unlink() for s in p.glob("*.safetensors")],
        UnsupportedCheckpoint,
        r"holds no weights: there is no \*\.safetensors",
    ),
    "missing shard": (wrong_index, MissingShard, r"model-00002\.safetensors is missing"),
    "no index": (lambda p: (p / "model-00002.safetensors").unlink(), TensorNotFound, r"none of the 1 .* \(\d+ of 78"),
    "truncated": (lambda p: cut(p, -1), TruncatedShard, "promises"),
    "truncated header": (lambda p: cut(p, 40), TruncatedShard, "its header alone has"),
    "empty": (lambda p: cut(p, 0), CorruptShard, "header of 0 bytes"),
    "too long": (lambda p: first(p, (p / FIRST).read_bytes() + b"x"), CorruptShard, "accounts for"),
    "garbage": (lambda p: header_of(p, b"garbage!"), CorruptShard, "header: not valid JSON"),
    "header of numbers": (lambda p: header_of(p, b'{"a":1}'), CorruptShard, "header: a is 1, expected a JSON object"),
    "git-lfs": (lambda p: first(p, b"version https://git-lfs.github.com/spec/v1\n"), CorruptShard, "git-lfs pointer"),
    "overlap": (lambda p: rewrite_header(p, overlap), CorruptShard, "lies at"),
    "missing": (
        lambda p: edit(p, lambda t: t.pop(sorted(t)[1])),
        TensorNotFound,
        r"1 of 78 tensors are missing",
    ),
    "unexpected": (
        lambda p: add(p, "model.x"),
        UnexpectedTensor,
        r"00001\.safetensors: model\.x \[2\] is not a tensor",
    ),
    "vision in a text model": (lambda p: add(p, "vision_model.x"), UnexpectedTensor, "vision_model"),
    "duplicated": (lambda p: shutil.copy(p / FIRST, p / "n.safetensors"), UnexpectedTensor, r"and again in n\.safet"),
    "misshapen": (lambda p: replace_q(p, lambda t: t[:-1].clone()), ShapeMismatch, Q_SHAPE),
    "dtype": (lambda p: replace_q(p, lambda t: t.to(torch.int8)), ShapeMismatch, "has dtype I8, expected one of BF16"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named_before_anything_is_written(copy: Path, case: str) -> None:
    damage, error, text = DAMAGE[case]
    damage(copy)
    with pytest.raises(error, match=text):
        Checkpoint(copy)


def test_scales_in_bf16_are_read(copy_fp8: Path) -> None:
    for shard in sorted(copy_fp8.glob("*.safetensors")):
        edit(
            copy_fp8,
            lambda t: t.update({k: v.bfloat16() for k, v in t.items() if k.endswith("_scale_inv")}),
            shard.name,
        )
    with Checkpoint(copy_fp8) as checkpoint:
        for shard in sorted(copy_fp8.glob("*.safetensors")):
            tensors = load_file(shard)
            for name in [name for name in tensors if name.endswith("up_proj.weight_scale_inv") and ".moe." in name]:
                weight = name.removesuffix("_scale_inv")
                scale = tensors[name].float().repeat_interleave(128, 1).repeat_interleave(128, 2)
                rows = tensors[weight].shape[1]
                out = np.empty((rows, tensors[weight].shape[2]), np.float32)
                widen(checkpoint.values(weight, rows, 2 * rows), out)
                np.testing.assert_array_equal(out, (tensors[weight].float() * scale)[1].numpy())


def test_fp8_without_its_scale_is_named(copy_fp8: Path) -> None:
    for shard in sorted(copy_fp8.glob("*.safetensors")):
        edit(copy_fp8, lambda t: [t.pop(k) for k in list(t) if k.endswith("up_proj.weight_scale_inv")], shard.name)
    with pytest.raises(TensorNotFound, match=r"up_proj\.weight is F8_E4M3, but .*_scale_inv is in no shard"):
        Checkpoint(copy_fp8)


def test_scales_of_another_block_size_are_named(copy_fp8: Path) -> None:
    edit(copy_fp8, lambda t: t.update({k: v[:, :1].clone() for k, v in t.items() if k.endswith("_scale_inv")}))
    with pytest.raises(ShapeMismatch, match=r"expected F32 \[6, 2, 2\] \(128 x 128 blocks\)"):
        Checkpoint(copy_fp8)


def test_a_shard_that_is_not_there_is_named_also_where_only_scales_were_in_it(copy_fp8: Path) -> None:
    scales: dict[str, torch.Tensor] = {}
    (copy_fp8 / INDEX).unlink()
    for shard in sorted(copy_fp8.glob("*.safetensors")):
        edit(
            copy_fp8, lambda t: [scales.update({k: t.pop(k)}) for k in list(t) if k.endswith("_scale_inv")], shard.name
        )
    for shard in sorted(copy_fp8.glob("*.safetensors")):
        shard.rename(copy_fp8 / f"{shard.stem}-of-00003.safetensors")
    with pytest.raises(MissingShard, match=r"model-00003-of-00003\.safetensors is missing"):
        Checkpoint(copy_fp8)
    save_file(scales, copy_fp8 / "model-00003-of-00003.safetensors")
    Checkpoint(copy_fp8).close()


def test_scales_of_activations_and_of_the_cache_are_no_weights(copy_fp8: Path, small_fp8: Path) -> None:
    with Checkpoint(small_fp8) as before:
        specs = before.specs
    for shard in sorted(copy_fp8.glob("*.safetensors")):
        edit(
            copy_fp8,
            lambda t: t.update(
                {k.replace("weight_scale_inv", "input_scale"): torch.ones([]) for k in t if k.endswith("_scale_inv")}
            ),
            shard.name,
        )
    cache = ("model.layers.0.self_attn.k_scale", "model.layers.5.self_attn.v_scale")
    edit(copy_fp8, lambda t: t.update({name: torch.ones([]) for name in cache}))
    with Checkpoint(copy_fp8) as checkpoint:
        checkpoint.require_mtp()
        assert checkpoint.specs == specs
