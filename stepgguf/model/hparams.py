"""HParams: what config.json says, checked and spread over the layers.

config.json is parsed as JSON and never through transformers' AutoConfig, which since 5.16 rewrites it (it drops
partial_rotary_factors and moe_layers_enum and cuts the per-layer lists). Two spellings exist:

    Step-3.5   flat                 architectures: [Step3p5ForCausalLM]
    Step-3.7   under "text_config"  architectures: [Step3p7ForConditionalGeneration]; lacks use_qk_norm,
                                    zero_centered and tie_word_embeddings although the weights are the same

Per-layer lists cover trunk and MTP (48 entries for 45 + 3); in some checkpoints they are cut to the trunk's 45. MTP
layers are sliding-attention layers then too, with the sliding layers' head count and no clamp.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stepgguf.errors import BadConfig, UnsupportedModel

ARCHITECTURES = ("Step3p5ForCausalLM", "Step3p7ForConditionalGeneration")

# Switches of the published code that no published checkpoint flips. A missing key means the value here: the 3.7
# config leaves several out although its weights have the feature.
FIXED: dict[str, Any] = {
    "use_qk_norm": True,
    "zero_centered": True,
    "tie_word_embeddings": False,
    "use_head_wise_attn_gate": True,
    "use_moe": True,
    "use_moe_router_bias": True,
    "use_mfa": False,
    "sink": False,
    "hidden_act": "silu",
    "att_impl_type": "GQA",
    "moe_router_activation": "sigmoid",
    "moe_every_n_layer": 1,
    "moe_layer_offset": 0,
}


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """llama3 scaling of the rotary frequencies, applied on full-attention layers only."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True, slots=True)
class Layer:
    """One transformer block: index < n_layer is the trunk, the rest are MTP blocks. A clamp of 0 means none."""

    index: int
    is_mtp: bool
    is_sliding: bool
    is_moe: bool
    n_head: int
    n_head_kv: int
    n_rot: int  # rotary dimensions of a head
    rope_theta: float
    clamp: float  # SwiGLU limit of the routed experts
    clamp_shared: float  # SwiGLU limit of the shared expert and of a dense MLP


@dataclass(frozen=True, slots=True)
class HParams:
    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    head_dim: int
    n_layer: int
    n_mtp: int
    n_expert: int
    n_expert_used: int
    expert_size: int
    shared_expert_size: int
    router_scale: float
    router_norm: bool
    sliding_window: int
    rms_norm_eps: float
    max_position: int
    rope_scaling: RopeScaling | None
    bos_token_id: int
    eos_token_ids: tuple[int, ...]
    layers: tuple[Layer, ...]

    @property
    def trunk(self) -> tuple[Layer, ...]:
        return self.layers[: self.n_layer]

    @property
    def mtp(self) -> tuple[Layer, ...]:
        return self.layers[self.n_layer :]

    @property
    def rope_theta_full(self) -> float:
        return next(layer.rope_theta for layer in self.layers if not layer.is_sliding)

    @property
    def rope_theta_sliding(self) -> float:
        return next(layer.rope_theta for layer in self.layers if layer.is_sliding)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> HParams:
        """Read a parsed config.json. Raises UnsupportedModel for another architecture, BadConfig for a bad value."""
        architecture = _architecture(config)
        text = _Keys(config.get("text_config", config))
        for key, value in FIXED.items():
            if text.get(key, value) != value:
                raise UnsupportedModel(
                    f"config.json: {key} is {text.get(key)!r}; stepgguf and llama.cpp know only {value!r}",
                    hint="This checkpoint is a variant that no published Step-3.x model uses.",
                )
        n_layer, n_mtp = text.int("num_hidden_layers"), text.int("num_nextn_predict_layers", 0)
        return cls(
            architecture=architecture,
            vocab_size=text.int("vocab_size"),
            hidden_size=text.int("hidden_size"),
            intermediate_size=text.int("intermediate_size"),
            head_dim=text.int("head_dim"),
            n_layer=n_layer,
            n_mtp=n_mtp,
            n_expert=text.int("moe_num_experts"),
            n_expert_used=text.int("moe_top_k"),
            expert_size=text.int("moe_intermediate_size"),
            shared_expert_size=text.int("share_expert_dim"),
            router_scale=text.float("moe_router_scaling_factor", 1.0),
            router_norm=bool(text.get("norm_expert_weight", True)),
            sliding_window=text.int("sliding_window"),
            rms_norm_eps=text.float("rms_norm_eps", 1e-5),
            max_position=text.int("max_position_embeddings"),
            rope_scaling=_rope_scaling(text),
            bos_token_id=text.int("bos_token_id"),
            eos_token_ids=_int_list(text["eos_token_id"]),
            layers=_layers(text, n_layer, n_mtp),
        )


class _Keys:
    """A config section whose missing keys and wrong types are errors with the key's name."""

    def __init__(self, section: Any) -> None:
        if not isinstance(section, Mapping):
            raise BadConfig(f"config.json: expected an object, found {type(section).__name__}")
        self._section = section

    def get(self, key: str, default: Any = None) -> Any:
        value = self._section.get(key)
        return default if value is None else value

    def __getitem__(self, key: str) -> Any:
        value = self._section.get(key)
        if value is None:
            raise BadConfig(
                f"config.json: key {key!r} is missing", hint="Take config.json from the model's repository."
            )
        return value

    def int(self, key: str, default: int | None = None) -> int:
        value = self[key] if default is None else self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise BadConfig(f"config.json: {key} is {value!r}, expected a non-negative integer")
        return value

    def float(self, key: str, default: float | None = None) -> float:
        value = self[key] if default is None else self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise BadConfig(f"config.json: {key} is {value!r}, expected a number")
        return float(value)


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures") or []
    if isinstance(names, Sequence):
        for name in names:
            if name in ARCHITECTURES:
                return str(name)
    raise UnsupportedModel(
        f"config.json: architectures is {names!r}, expected one of {', '.join(ARCHITECTURES)}",
        hint="stepgguf converts Step-3.5-Flash and the text part of Step-3.7-Flash only.",
    )


def _int_list(value: Any) -> tuple[int, ...]:
    """An int, a list of ints or the string "3,4,5", as a tuple."""
    items = value.split(",") if isinstance(value, str) else value if isinstance(value, Sequence) else [value]
    try:
        return tuple(int(item) for item in items)
    except (TypeError, ValueError):
        raise BadConfig(f"config.json: {value!r} is not a list of integers") from None


def _rope_scaling(text: _Keys) -> RopeScaling | None:
    section = text.get("rope_scaling")
    if section is None:
        return None
    keys = _Keys(section)
    kind = keys.get("rope_type", keys.get("type"))
    types = text.get("yarn_only_types", ["full_attention"])
    if kind != "llama3" or list(types) != ["full_attention"]:
        raise UnsupportedModel(
            f"config.json: rope_scaling is {kind!r} on {types!r}; only llama3 on full_attention layers is known"
        )
    return RopeScaling(
        factor=keys.float("factor"),
        low_freq_factor=keys.float("low_freq_factor"),
        high_freq_factor=keys.float("high_freq_factor"),
        original_max_position=keys.int("original_max_position_embeddings"),
    )


def _per_layer(text: _Keys, key: str, n_layer: int, n_all: int, mtp_default: Any) -> list[Any]:
    """A per-layer list of n_all entries. One cut to the trunk is filled with the MTP blocks' value."""
    value = text[key]
    if not isinstance(value, Sequence) or isinstance(value, str):
        value = [value] * n_all
    if len(value) not in (n_layer, n_all):
        raise BadConfig(
            f"config.json: {key} has {len(value)} entries, expected {n_all} (trunk and MTP) or {n_layer} (trunk)"
        )
    return list(value) + [mtp_default] * (n_all - len(value))


def _layers(text: _Keys, n_layer: int, n_mtp: int) -> tuple[Layer, ...]:
    n_all = n_layer + n_mtp
    types = _per_layer(text, "layer_types", n_layer, n_all, "sliding_attention")
    for i, kind in enumerate(types):
        if kind not in ("full_attention", "sliding_attention"):
            raise BadConfig(f"config.json: layer_types[{i}] is {kind!r}, expected full_attention or sliding_attention")
    sliding = types.index("sliding_attention") if "sliding_attention" in types[:n_layer] else None
    if sliding is None or "full_attention" not in types[:n_layer]:
        raise UnsupportedModel("config.json: layer_types needs both full_attention and sliding_attention layers")

    thetas, factors = (text[key] for key in ("rope_theta", "partial_rotary_factors"))
    thetas = _per_layer(text, "rope_theta", n_layer, n_all, thetas[sliding] if isinstance(thetas, list) else thetas)
    factors = _per_layer(text, "partial_rotary_factors", n_layer, n_all, 1.0)
    limits = {
        key: _per_layer(text, key, n_layer, n_all, 0.0) if text.get(key) is not None else [0.0] * n_all
        for key in ("swiglu_limits", "swiglu_limits_shared")
    }
    other = _Keys(text.get("attention_other_setting", {}))
    heads = (text.int("num_attention_heads"), text.int("num_attention_groups"))
    heads_sliding = (other.int("num_attention_heads", heads[0]), other.int("num_attention_groups", heads[1]))
    head_dim, moe = text.int("head_dim"), set(_int_list(text["moe_layers_enum"]))

    layers = []
    for i in range(n_all):
        is_sliding = types[i] == "sliding_attention"
        n_head, n_head_kv = heads_sliding if is_sliding else heads
        # llama.cpp (step35.cpp) halves the rotary dimensions on full layers by itself and knows no other ratio.
        if float(factors[i]) != (1.0 if is_sliding else 0.5):
            raise UnsupportedModel(
                f"config.json: partial_rotary_factors[{i}] is {factors[i]!r}; llama.cpp knows only 0.5 on "
                "full_attention and 1.0 on sliding_attention layers"
            )
        if float(thetas[i]) != float(thetas[types.index(types[i])]):
            raise UnsupportedModel(f"config.json: rope_theta[{i}] differs from other {types[i]} layers")
        layers.append(
            Layer(
                index=i,
                is_mtp=i >= n_layer,
                is_sliding=is_sliding,
                is_moe=i in moe and i < n_layer,
                n_head=n_head,
                n_head_kv=n_head_kv,
                n_rot=head_dim if is_sliding else head_dim // 2,
                rope_theta=float(thetas[i]),
                clamp=float(limits["swiglu_limits"][i] or 0.0),
                clamp_shared=float(limits["swiglu_limits_shared"][i] or 0.0),
            )
        )
    return tuple(layers)
