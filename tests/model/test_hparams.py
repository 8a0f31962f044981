from __future__ import annotations

from typing import Any

import pytest

from stepgguf.errors import BadConfig, UnsupportedModel
from stepgguf.model.hparams import HParams
from stepgguf.model.layers import RopeScaling
from tests.conftest import real_config


@pytest.mark.parametrize("version", ["3.5", "3.7"])
def test_the_published_configs_are_read(version: str) -> None:
    hp = HParams.from_config(real_config(version))
    assert (hp.n_layer, hp.n_mtp, hp.n_expert, hp.n_expert_used) == (45, 3, 288, 8)
    assert (hp.hidden_size, hp.intermediate_size, hp.expert_size, hp.vocab_size) == (4096, 11264, 1280, 128896)
    assert hp.rms_norm_eps == 1e-5  # the key is missing in both
    assert hp.rope_scaling == RopeScaling(2.0, 1.0, 32.0, 131072)
    assert hp.eos_token_ids == (1, 2, 128007)
    assert [y.index for y in hp.layers if not y.is_sliding] == list(range(0, 45, 4))
    assert {(y.is_sliding, y.n_head, y.n_rot, y.rope_theta) for y in hp.layers} == {
        (False, 64, 64, 5e6),
        (True, 96, 128, 1e4),
    }
    assert all(y.is_mtp and y.is_sliding and not y.is_moe for y in hp.mtp)
    assert [y.index for y in hp.layers if y.is_moe] == list(range(3, 45))
    assert {y.index: y.clamp for y in hp.layers if y.clamp} == {43: 7.0, 44: 7.0}
    assert {y.index: y.clamp_shared for y in hp.layers if y.clamp_shared} == (
        {44: 16.0} if version == "3.5" else {43: 16.0, 44: 16.0}
    )


def test_lists_cut_to_the_trunk_give_sliding_mtp_layers() -> None:
    config = real_config()
    whole = HParams.from_config(config)
    for key, value in config.items():
        if isinstance(value, list) and len(value) == 48:
            config[key] = value[:45]
    assert HParams.from_config(config) == whole


def test_moe_layers_may_be_a_list() -> None:
    config = real_config()
    config["moe_layers_enum"] = list(range(3, 45))
    assert HParams.from_config(config) == HParams.from_config(real_config())


@pytest.mark.parametrize("key", ["hidden_size", "moe_num_experts", "layer_types", "moe_layers_enum", "eos_token_id"])
def test_a_missing_key_is_named(key: str) -> None:
    config = real_config()
    del config[key]
    with pytest.raises(BadConfig, match=f"key '{key}' is missing"):
        HParams.from_config(config)


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("hidden_size", "4096", "hidden_size is '4096', expected an integer from 1"),
        ("moe_router_scaling_factor", "x", "expected a number"),
        ("layer_types", ["full_attention"] * 7, "layer_types has 7 entries, expected 48"),
        ("layer_types", ["chunked_attention"] * 48, r"layer_types\[0\] is 'chunked_attention'"),
        ("moe_layers_enum", "3,x", "moe_layers_enum is '3,x', expected a list of integers"),
    ],
)
def test_a_bad_value_is_named(key: str, value: Any, text: str) -> None:
    with pytest.raises(BadConfig, match=text):
        HParams.from_config(real_config() | {key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("architectures", ["LlamaForCausalLM"]),
        ("architectures", None),
        ("use_qk_norm", False),
        ("zero_centered", False),
        ("tie_word_embeddings", True),
        ("sink", True),
        ("moe_router_activation", "softmax"),
        ("partial_rotary_factors", [1.0] * 48),
        ("rope_theta", [float(i + 1) for i in range(48)]),
        ("rope_scaling", {"rope_type": "yarn", "factor": 2.0}),
        ("layer_types", ["full_attention"] * 48),
    ],
)
def test_another_model_is_refused(key: str, value: Any) -> None:
    with pytest.raises(UnsupportedModel):
        HParams.from_config(real_config() | {key: value})
