"""config.json in each of its spellings: what HParams reads of it, and what it refuses."""

from __future__ import annotations

import json
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
    assert all(y.is_mtp and y.is_sliding and not y.is_moe for y in hp.layers[hp.n_layer :])
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


def saved(version: str = "3.7", **mtp: Any) -> dict[str, Any]:
    """The published config as transformers' save_pretrained writes it."""
    from transformers import Step3p7Config
    from transformers.models.step3p7.configuration_step3p7 import Step3p7TextConfig

    if version == "3.7":
        written = Step3p7Config(**real_config("3.7")).to_dict()
    else:
        written = Step3p7TextConfig(**real_config("3.5")).to_dict() | {"architectures": ["Step3p5ForCausalLM"]}
    result: dict[str, Any] = json.loads(json.dumps(written | {"architectures": real_config(version)["architectures"]}))
    (result["text_config"] if version == "3.7" else result).update(mtp)
    return result


@pytest.mark.parametrize("version", ["3.5", "3.7"])
def test_what_transformers_makes_of_the_published_configs_says_the_same(version: str) -> None:
    config = saved(version)
    text = config.get("text_config", config)
    assert "moe_layers_enum" not in text
    assert "n_routed_experts" in text
    assert len(text["layer_types"]) == 45
    assert HParams.from_config(config) == HParams.from_config(real_config(version))


def test_mtp_layers_are_what_mtp_layer_types_says() -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    hp = HParams.from_config(saved(mtp_layer_types=kinds))
    assert [(y.is_sliding, y.n_head, y.rope_theta) for y in hp.layers[hp.n_layer :]] == [
        (True, 96, 1e4), (False, 64, 5e6), (True, 96, 1e4),
    ]  # fmt: skip


def test_heads_of_single_layers_are_those_of_per_layer_config() -> None:
    config = saved(per_layer_config={"1": {"num_attention_heads": 48}, "2": {"num_key_value_heads": 4}})
    assert [(y.n_head, y.n_head_kv) for y in HParams.from_config(config).layers[:4]] == [
        (64, 8), (48, 8), (96, 4), (96, 8),
    ]  # fmt: skip


def test_a_config_without_mtp_may_have_longer_lists() -> None:
    whole = HParams.from_config(real_config())
    assert HParams.from_config(real_config() | {"num_nextn_predict_layers": 0}) == whole.without_mtp()
    assert len(whole.without_mtp().layers) == 45


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
        ("hidden_size", 2**32, "hidden_size is 4294967296, expected an integer from 1 to 2147483647"),
        ("hidden_size", True, "hidden_size is True, expected an integer"),
        ("hidden_size", 4096.0, r"hidden_size is 4096\.0, expected an integer"),
        ("hidden_size", -1, "hidden_size is -1, expected an integer from 1"),
        ("hidden_size", {"a": 1}, "hidden_size is an object of 1 members, expected"),
        ("num_hidden_layers", 10**9, "num_hidden_layers is 1000000000, expected an integer from 1 to 512"),
        ("num_nextn_predict_layers", 10**9, "expected an integer from 0 to 467"),
        ("moe_num_experts", 0, "moe_num_experts is 0, expected an integer from 1 to 512"),
        ("moe_top_k", 289, "moe_top_k is 289, expected an integer from 1 to 288"),
        ("head_dim", 126, "head_dim is 126, expected a multiple of 4"),
        ("num_attention_groups", 0, "num_attention_groups is 0, expected"),
        ("num_attention_groups", 7, "layer 0 has 64 attention heads for 7 KV heads"),
        ("rms_norm_eps", float("nan"), "rms_norm_eps is nan, expected a number from 0 to 1"),
        ("moe_router_scaling_factor", float("inf"), "moe_router_scaling_factor is inf, expected a number"),
        ("moe_router_scaling_factor", 10**400, "moe_router_scaling_factor is 1000.*, expected a number"),
        ("rope_theta", ["x"] * 48, r"rope_theta\[0\] is 'x', expected a number"),
        ("rope_theta", 0, "rope_theta is 0, expected a number from 1"),
        ("swiglu_limits", [0.0] * 47 + [None, "x"][1:], r"swiglu_limits\[47\] is 'x', expected a number"),
        ("layer_types", [["full_attention"]] * 48, r"layer_types\[0\] is a list of 1, expected full_attention or"),
        ("moe_layers_enum", "3," * 9000, r"moe_layers_enum is '3,3.*\.\.\. \(18002 characters\), expected a list"),
        ("moe_layers_enum", [3, 2**40], r"moe_layers_enum\[1\] is 1099511627776, expected"),
        ("eos_token_id", [1, None], r"eos_token_id\[1\] is None, expected"),
        ("max_position_embeddings", 2**40, "max_position_embeddings is 1099511627776, expected"),
        ("rope_scaling", {"rope_type": "llama3", "factor": 0}, r"key 'low_freq_factor' is missing in rope_scaling"),
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
        ("attention_bias", True),
        ("query_pre_attn_scalar", 256),
        ("rope_parameters", {"full_attention": {"rope_type": "yarn", "rope_theta": 5e6, "factor": 2.0}}),
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
