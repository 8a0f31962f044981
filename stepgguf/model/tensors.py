"""THE table: every tensor of the published text checkpoints, with its GGUF name, shape and treatment.

One row per kind of tensor. `where` says which blocks have it; shapes are written with the letters

    d hidden_size   f intermediate_size   x expert_size   s shared_expert_size   n n_expert   v vocab_size
    e head_dim      h the layer's heads   q h * e         k the layer's kv heads * e          D 2 * hidden_size

in numpy order. `plus_one` marks norms, which the checkpoint stores minus one and GGUF stores whole. `float32` marks
what may never be quantized: norms, the router and its bias.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from stepgguf.model.hparams import HParams
from stepgguf.model.layers import Layer


@dataclass(frozen=True, slots=True)
class Row:
    where: str  # "model", "layer", "dense", "moe" or "mtp"
    source: str
    name: str
    shape: str
    plus_one: bool = False
    float32: bool = False


def _norm(where: str, source: str, name: str, shape: str) -> Row:
    return Row(where, source, name, shape, plus_one=True, float32=True)


TENSORS = (
    Row("model", "model.embed_tokens.weight", "token_embd.weight", "vd"),
    _norm("model", "model.norm.weight", "output_norm.weight", "d"),
    Row("model", "lm_head.weight", "output.weight", "vd"),
    _norm("layer", "input_layernorm.weight", "attn_norm.weight", "d"),
    Row("layer", "self_attn.q_proj.weight", "attn_q.weight", "qd"),
    Row("layer", "self_attn.k_proj.weight", "attn_k.weight", "kd"),
    Row("layer", "self_attn.v_proj.weight", "attn_v.weight", "kd"),
    Row("layer", "self_attn.o_proj.weight", "attn_output.weight", "dq"),
    Row("layer", "self_attn.g_proj.weight", "attn_gate.weight", "hd"),
    _norm("layer", "self_attn.q_norm.weight", "attn_q_norm.weight", "e"),
    _norm("layer", "self_attn.k_norm.weight", "attn_k_norm.weight", "e"),
    _norm("layer", "post_attention_layernorm.weight", "ffn_norm.weight", "d"),
    Row("dense", "mlp.gate_proj.weight", "ffn_gate.weight", "fd"),
    Row("dense", "mlp.up_proj.weight", "ffn_up.weight", "fd"),
    Row("dense", "mlp.down_proj.weight", "ffn_down.weight", "df"),
    Row("moe", "moe.gate.weight", "ffn_gate_inp.weight", "nd", float32=True),
    Row("moe", "moe.router_bias", "exp_probs_b.bias", "n", float32=True),
    Row("moe", "moe.gate_proj.weight", "ffn_gate_exps.weight", "nxd"),
    Row("moe", "moe.up_proj.weight", "ffn_up_exps.weight", "nxd"),
    Row("moe", "moe.down_proj.weight", "ffn_down_exps.weight", "ndx"),
    Row("moe", "share_expert.gate_proj.weight", "ffn_gate_shexp.weight", "sd"),
    Row("moe", "share_expert.up_proj.weight", "ffn_up_shexp.weight", "sd"),
    Row("moe", "share_expert.down_proj.weight", "ffn_down_shexp.weight", "ds"),
    _norm("mtp", "enorm.weight", "nextn.enorm.weight", "d"),
    _norm("mtp", "hnorm.weight", "nextn.hnorm.weight", "d"),
    Row("mtp", "eh_proj.weight", "nextn.eh_proj.weight", "dD"),
    _norm("mtp", "transformer.shared_head.norm.weight", "nextn.shared_head_norm.weight", "d"),
    Row("mtp", "transformer.shared_head.output.weight", "nextn.shared_head_head.weight", "vd"),
)

# llama3 RoPE scaling as divisors of the frequencies. Not in the checkpoint: computed from config.json.
ROPE_FREQS = "rope_freqs.weight"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of one model: a Row with layer and shape filled in. `role` is the GGUF name's last word."""

    source: str
    name: str
    role: str
    shape: tuple[int, ...]
    layer: int | None
    is_mtp: bool
    plus_one: bool
    float32: bool


def tensor_specs(hp: HParams) -> list[TensorSpec]:
    """Every tensor that a checkpoint with these hparams has, trunk and MTP, in file_order."""
    specs = [_spec(row, hp, None) for row in TENSORS if row.where == "model"]
    for layer in hp.layers:
        kinds = {"layer", "moe" if layer.is_moe else "dense"} | ({"mtp"} if layer.is_mtp else set())
        specs += [_spec(row, hp, layer) for row in TENSORS if row.where in kinds]
    return sorted(specs, key=lambda spec: file_order(spec.name))


def file_order(name: str) -> tuple[int, str]:
    """Sort key of GGUF tensor names: llama-quantize's own order, which its mixture rules count in."""
    layer = layer_of(name)
    return -1 if layer is None else layer, name


_LAYER = re.compile(r"blk\.(\d{1,9})\.")


def layer_of(name: str) -> int | None:
    """The layer of "blk.N.…", None of what is in no layer."""
    match = _LAYER.match(name)
    return int(match[1]) if match else None


def is_beyond(source: str, n_layer: int) -> bool:
    """Whether a checkpoint's tensor is in a layer after the trunk's, as MTP blocks are."""
    match = re.match(r"model\.layers\.(\d{1,9})\.", source)
    return match is not None and int(match[1]) >= n_layer


def role_of(name: str) -> str:
    """A tensor's role: the word before ".weight" or ".bias"."""
    return name.rpartition(".")[0].rpartition(".")[2] or name


def _spec(row: Row, hp: HParams, layer: Layer | None) -> TensorSpec:
    sizes = {
        "d": hp.hidden_size, "D": 2 * hp.hidden_size, "f": hp.intermediate_size, "x": hp.expert_size,
        "s": hp.shared_expert_size, "n": hp.n_expert, "v": hp.vocab_size, "e": hp.head_dim,
    }  # fmt: skip
    if layer is not None:
        sizes |= {"h": layer.n_head, "q": layer.n_head * hp.head_dim, "k": layer.n_head_kv * hp.head_dim}
    return TensorSpec(
        source=row.source if layer is None else f"model.layers.{layer.index}.{row.source}",
        name=row.name if layer is None else f"blk.{layer.index}.{row.name}",
        role=role_of(row.name),
        shape=tuple(sizes[letter] for letter in row.shape),
        layer=None if layer is None else layer.index,
        is_mtp=layer is not None and layer.is_mtp,
        plus_one=row.plus_one,
        float32=row.float32,
    )
