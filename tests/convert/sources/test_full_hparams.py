"""A GGUF's keys give the hyperparameters that its checkpoint has, as far as the forward pass needs them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFValueType

from stepgguf.cli.main import main
from stepgguf.convert.sources.checkpoint import Checkpoint
from stepgguf.convert.sources.full_hparams import full_hparams
from stepgguf.convert.sources.gguf_file import GGUFSource
from stepgguf.convert.sources.opening import open_source
from stepgguf.errors import BadMetadata, UnsupportedModel
from stepgguf.files.gguf_header import Key
from stepgguf.model.hparams import HParams

V = GGUFValueType


def as_a_gguf_has_them(hp: HParams) -> HParams:
    """Less what a GGUF does not say: the scaling's own numbers, the order of end tokens, digits beyond float32."""
    layers = tuple(
        replace(layer, clamp=float(np.float32(layer.clamp)), clamp_shared=float(np.float32(layer.clamp_shared)))
        for layer in hp.layers
    )
    ends = tuple(sorted(hp.eos_token_ids))
    return replace(hp, rope_scaling=None, eos_token_ids=ends, rms_norm_eps=float(np.float32(1e-5)), layers=layers)


@pytest.fixture(scope="module")
def gguf(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("full") / "small.gguf"
    assert main(["convert", str(small), str(path), "-t", "BF16", "--mtp-type", "BF16", "-q"]) == 0
    return path


def test_a_checkpoint_has_its_own(small: Path) -> None:
    with Checkpoint(small) as checkpoint:
        assert full_hparams(checkpoint) is checkpoint.hparams


@pytest.mark.parametrize("mode", ["include", "drop"])
def test_a_ggufs_are_its_checkpoints(mode: str, small: Path, tmp_path: Path) -> None:
    """Clamps, heads, windows, RoPE bases: all of them differ between the layers of this model."""
    path = tmp_path / "x.gguf"
    assert main(["convert", str(small), str(path), "-t", "Q8_0", "--mtp", mode, "-q"]) == 0
    with Checkpoint(small) as checkpoint, open_source(path) as source:
        hp = checkpoint.hparams if mode == "include" else checkpoint.hparams.without_mtp()
        found = full_hparams(source)
    assert as_a_gguf_has_them(found) == as_a_gguf_has_them(hp)


def test_a_file_of_mtp_blocks_alone_is_refused(separate_gguf: Path) -> None:
    mtp = separate_gguf.with_name("mtp-demo.gguf")
    with open_source(mtp) as source, pytest.raises(BadMetadata, match=r"mtp-demo\.gguf: the tensor \S+ is missing"):
        full_hparams(source)
    with open_source(separate_gguf) as source:  # its keys may name MTP blocks that are in the other file
        assert full_hparams(source).n_mtp == 0


@pytest.mark.parametrize(
    ("key", "value", "kind", "error", "message"),
    [
        ("expert_gating_func", 1, V.UINT32, UnsupportedModel, "the router's function is 1, expected 2, the sigmoid"),
        (
            "expert_feed_forward_length",
            512,
            V.UINT32,
            BadMetadata,
            r"ffn_down_exps\.weight is \[6, 256, 256\], and the",
        ),
        ("expert_shared_feed_forward_length", "x", V.STRING, BadMetadata, "is 'x', expected a count"),
        ("rope.freq_base_swa", 7, V.UINT32, BadMetadata, r"step35\.rope\.freq_base_swa is 7, expected a number"),
        ("expert_weights_norm", 1, V.UINT32, BadMetadata, "expert_weights_norm is 1, expected true or false"),
        ("leading_dense_block_count", 1, V.UINT32, BadMetadata, r"the tensor blk\.1\.\S+ is missing"),
    ],
)
def test_keys_that_cannot_be_are_named(
    key: str, value: object, kind: GGUFValueType, error: type[Exception], message: str, gguf: Path
) -> None:
    with GGUFSource(gguf) as source:
        name = f"step35.{key}"
        source.headers[0].keys[name] = Key.of(name, value, kind)
        with pytest.raises(error, match=rf"small\.gguf: .*{message}"):
            full_hparams(source)


def test_limits_are_for_each_layer_and_none_without_the_key(gguf: Path) -> None:
    with GGUFSource(gguf) as source:
        keys = source.headers[0].keys
        del keys["step35.swiglu_clamp_exp"]
        assert [layer.clamp for layer in full_hparams(source).layers] == [0.0] * 8
        keys["step35.swiglu_clamp_exp"] = Key.of("step35.swiglu_clamp_exp", [1.0], V.ARRAY, V.FLOAT32)
        with pytest.raises(
            BadMetadata, match=r"swiglu_clamp_exp is a list of 1, expected a number for each of 8 layers"
        ):
            full_hparams(source)
