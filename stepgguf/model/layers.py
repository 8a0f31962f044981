"""What config.json says of each layer: attention, heads, RoPE, experts, clamps; in the spellings of hparams.py.

Per-layer lists cover trunk and MTP (48 entries for 45 + 3), or the trunk alone: transformers cuts them, some merges set
num_nextn_predict_layers to 0 and leave the lists. MTP layers that no list covers are what mtp_layer_types says, or else
sliding-attention layers, with the sliding layers' heads and no clamp.
"""

from __future__ import annotations

from dataclasses import dataclass

from stepgguf.errors import BadConfig, UnsupportedModel
from stepgguf.files.jsonread import Value

# Keys of the published configs, and transformers' names for them.
ALIASES = {
    "moe_num_experts": "n_routed_experts",
    "moe_top_k": "num_experts_per_tok",
    "num_attention_groups": "num_key_value_heads",
}

# llama.cpp's own limits (llama-hparams.h), and those of the GGUF types that the values are stored in.
MAX_LAYERS, MAX_EXPERTS = 512, 512
MAX_SIZE = 2**31 - 1
MAX_FLOAT = 3.4e38


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


def read_layers(text: Value, n_layer: int, n_mtp: int) -> tuple[Layer, ...]:
    """All layers of the section that describes the text model, MTP blocks last. Raises BadConfig, UnsupportedModel."""
    n_all, head_dim, moe = n_layer + n_mtp, text["head_dim"].integer(), _moe_layers(text, n_layer)
    types = _attention_types(text, n_layer, n_all)
    thetas, heads = _rope_thetas(text, types, n_layer), _head_counts(text, types)
    _check_rotary(text, types, n_layer)
    clamps, clamps_shared = (
        _swiglu_limits(text, key, n_layer, n_all) for key in ("swiglu_limits", "swiglu_limits_shared")
    )
    return tuple(
        Layer(
            index=i,
            is_mtp=i >= n_layer,
            is_sliding=types[i] == "sliding_attention",
            is_moe=i in moe and i < n_layer,
            n_head=heads[i][0],
            n_head_kv=heads[i][1],
            n_rot=head_dim if types[i] == "sliding_attention" else head_dim // 2,
            rope_theta=thetas[i],
            clamp=clamps[i],
            clamp_shared=clamps_shared[i],
        )
        for i in range(n_all)
    )


def _per_layer(text: Value, key: str, n_layer: int, n_all: int) -> list[Value]:
    """The entries of a per-layer list, of the trunk's layers at least; one value for all layers is repeated."""
    value = text[key]
    if not isinstance(value.raw, list):
        return [value] * n_all
    items = value.array()
    if len(items) == n_layer or len(items) == n_all or (n_layer == n_all and len(items) > n_layer):
        return items[:n_all]
    expected = f"{n_all} (trunk and MTP) or {n_layer} (trunk)" if n_all > n_layer else f"{n_layer}"
    raise BadConfig(f"{value.document}: {value.place} has {len(items)} entries, expected {expected}")


def _attention_types(text: Value, n_layer: int, n_all: int) -> list[str]:
    """full_attention or sliding_attention for each layer."""
    items = _per_layer(text, "layer_types", n_layer, n_all)
    listed = text.get("mtp_layer_types")
    if len(items) < n_all and listed is not None:
        items += _per_layer(text, "mtp_layer_types", n_all - n_layer, n_all - n_layer)
    for item in items:
        if item.raw not in ("full_attention", "sliding_attention"):
            raise item.wrong("full_attention or sliding_attention")
    types = [item.text() for item in items]
    if len(set(types[:n_layer])) < 2:
        raise UnsupportedModel(
            f"{text.document}: layer_types needs both full_attention and sliding_attention layers in the trunk"
        )
    return types + ["sliding_attention"] * (n_all - len(types))


def _rope_thetas(text: Value, types: list[str], n_layer: int) -> list[float]:
    """The RoPE base of each layer. Layers of one attention type have the same: GGUF has one for each type."""
    by_type = _rope_by_type(text)
    if by_type is not None:
        return [by_type[attention]["rope_theta"].number(1.0, MAX_FLOAT) for attention in types]
    found = [item.number(1.0, MAX_FLOAT) for item in _per_layer(text, "rope_theta", n_layer, len(types))]
    found += [found[types.index(attention)] for attention in types[len(found) :]]  # MTP layers that no list covers
    for i, attention in enumerate(types):
        if found[i] != found[types.index(attention)]:
            raise UnsupportedModel(f"{text.document}: rope_theta[{i}] differs from other {attention} layers")
    return found


def _check_rotary(text: Value, types: list[str], n_layer: int) -> None:
    """llama.cpp (step35.cpp) halves the rotary dimensions on full layers by itself and knows no other ratio."""
    by_type = _rope_by_type(text)
    if by_type is not None:
        factors = [
            read_number(by_type[attention], "partial_rotary_factor", 0.0, 1.0, default=1.0) for attention in types
        ]
    else:
        factors = [item.number() for item in _per_layer(text, "partial_rotary_factors", n_layer, len(types))]
    for i, (factor, attention) in enumerate(zip(factors, types, strict=False)):
        if factor != (0.5 if attention == "full_attention" else 1.0):
            raise UnsupportedModel(
                f"{text.document}: the rotary factor of layer {i} is {factor}; llama.cpp knows only 0.5 on "
                "full_attention and 1.0 on sliding_attention layers"
            )


def _swiglu_limits(text: Value, key: str, n_layer: int, n_all: int) -> list[float]:
    """A SwiGLU limit for each layer; null is none."""
    if text.get(key) is None:
        return [0.0] * n_all
    found = [0.0 if item.raw is None else item.number(0.0, MAX_FLOAT) for item in _per_layer(text, key, n_layer, n_all)]
    return found + [0.0] * (n_all - len(found))


def _moe_layers(text: Value, n_layer: int) -> set[int]:
    """The trunk's layers that have experts, by transformers' list of types or by the published enumeration."""
    listed = text.get("mlp_layer_types")
    if listed is None:
        return set(read_integers(text["moe_layers_enum"], MAX_LAYERS))
    items = listed.array()
    if len(items) < n_layer:
        raise BadConfig(f"{listed.document}: {listed.place} has {len(items)} entries, expected {n_layer}")
    for item in items:
        if item.raw not in ("sparse", "dense"):
            raise item.wrong("sparse or dense")
    return {i for i, item in enumerate(items) if item.raw == "sparse"}


def _head_counts(text: Value, types: list[str]) -> list[tuple[int, int]]:
    """(heads, KV heads) of each layer; sliding-attention layers have their own number."""
    heads = text["num_attention_heads"].integer(1, MAX_SIZE)
    groups = read_aliased(text, "num_attention_groups").integer(1, MAX_SIZE)
    other = text.get("attention_other_setting")
    if other is not None:
        sliding = (
            read_integer(other, "num_attention_heads", 1, MAX_SIZE, default=heads),
            read_integer(other, "num_attention_groups", 1, MAX_SIZE, default=groups),
        )
    else:
        sliding = (read_integer(text, "num_sliding_attention_heads", 1, MAX_SIZE, default=heads), groups)
    found = [sliding if attention == "sliding_attention" else (heads, groups) for attention in types]
    for i, (n_head, n_head_kv) in enumerate(found):
        own = overrides.get(str(i)) if (overrides := text.get("per_layer_config")) is not None else None
        if own is not None:
            n_head = read_integer(own, "num_attention_heads", 1, MAX_SIZE, default=n_head)
            n_head_kv = read_integer(own, "num_key_value_heads", 1, MAX_SIZE, default=n_head_kv)
        if n_head % n_head_kv:
            raise BadConfig(f"{text.document}: layer {i} has {n_head} attention heads for {n_head_kv} KV heads")
        found[i] = n_head, n_head_kv
    return found


def _rope_by_type(text: Value) -> Value | None:
    """transformers' rope_parameters, if they are by layer type."""
    found = text.get("rope_parameters")
    return found if found is not None and "full_attention" in found.object() else None


def read_rope_scaling(text: Value) -> RopeScaling | None:
    """The scaling of full-attention layers' frequencies; None without. UnsupportedModel for any but llama3's."""
    by_type = _rope_by_type(text)
    if by_type is not None:
        section, others = by_type["full_attention"], by_type.get("sliding_attention")
        types = ["full_attention"]
        if others is not None and _rope_type(others) != "default":
            types.append("sliding_attention")
    else:
        found = text.get("rope_scaling") or text.get("rope_parameters")
        if found is None:
            return None
        section = found
        listed = text.get("yarn_only_types")
        types = ["full_attention"] if listed is None else [item.text() for item in listed.array()]
    rope_type = _rope_type(section)
    if rope_type == "default" and types == ["full_attention"]:
        return None
    if rope_type != "llama3" or types != ["full_attention"]:
        raise UnsupportedModel(
            f"{section.document}: {section.place} is {rope_type!r} on {', '.join(types)}; only llama3 on "
            "full_attention layers is known"
        )
    low = section["low_freq_factor"].number(0.0, 1e6)
    return RopeScaling(
        factor=section["factor"].number(1.0, 1e6),
        low_freq_factor=low,
        high_freq_factor=section["high_freq_factor"].number(low + 1e-3, 2e6),
        original_max_position=section["original_max_position_embeddings"].integer(1, MAX_SIZE),
    )


def _rope_type(section: Value) -> str:
    found = section.get("rope_type") or section.get("type")
    return "default" if found is None else found.text()


def read_aliased(text: Value, key: str) -> Value:
    """The key by its published name, or by transformers'. BadConfig names the published one if there is neither."""
    return text.get(key) or text.get(ALIASES[key]) or text[key]


def read_integer(section: Value, key: str, least: int, most: int, *, default: int) -> int:
    """An integer that may be missing. BadConfig outside [least, most]."""
    value = section.get(key)
    return default if value is None else value.integer(least, most)


def read_number(section: Value, key: str, least: float, most: float, *, default: float) -> float:
    """A number that may be missing. BadConfig outside [least, most]."""
    value = section.get(key)
    return default if value is None else value.number(least, most)


def read_integers(value: Value, most: int) -> tuple[int, ...]:
    """An int, a list of ints or the string "3,4,5", as a tuple."""
    if isinstance(value.raw, str):
        items = value.raw.split(",")
        if not all(item.strip().isdecimal() and len(item) < 12 and int(item) <= most for item in items):
            raise value.wrong(f"a list of integers from 0 to {most}")
        return tuple(map(int, items))
    return tuple(item.integer(0, most) for item in (value.array() if isinstance(value.raw, list) else [value]))
