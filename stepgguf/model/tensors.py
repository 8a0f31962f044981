"""THE table: every tensor of the published text checkpoints, with its GGUF name, shape and treatment.

One row per kind of tensor. `where` says which layers have it; shapes are written with the letters

    d hidden_size   f intermediate_size   x expert_size   s shared_expert_size   n n_expert   v vocab_size
    e head_dim      h the layer's heads   q h * e         k the layer's kv heads * e          D 2 * hidden_size

in numpy order. `plus_one` marks norms, which the checkpoint stores minus one and GGUF stores whole.
"""

from __future__ import annotations

from dataclasses import dataclass

from stepgguf.model.hparams import HParams
from stepgguf.model.layers import Layer
from stepgguf.model.names import TensorName


@dataclass(frozen=True, slots=True)
class TensorRule:
    """A row of the table. Its names lack the layer's prefix, unless `where` is "model"."""

    where: str  # "model", "layer", "dense", "moe" or "mtp"
    source: str
    name: str
    shape: str
    plus_one: bool = False

    @property
    def is_quantizable(self) -> bool:
        """Whether the tensors that it stands for can be quantized."""
        return len(self.shape) > 1 and _is_quantizable(TensorName(self.name))


def _norm_rule(where: str, source: str, name: str, shape: str) -> TensorRule:
    return TensorRule(where, source, name, shape, plus_one=True)


TENSORS = (
    TensorRule("model", "model.embed_tokens.weight", "token_embd.weight", "vd"),
    _norm_rule("model", "model.norm.weight", "output_norm.weight", "d"),
    TensorRule("model", "lm_head.weight", "output.weight", "vd"),
    _norm_rule("layer", "input_layernorm.weight", "attn_norm.weight", "d"),
    TensorRule("layer", "self_attn.q_proj.weight", "attn_q.weight", "qd"),
    TensorRule("layer", "self_attn.k_proj.weight", "attn_k.weight", "kd"),
    TensorRule("layer", "self_attn.v_proj.weight", "attn_v.weight", "kd"),
    TensorRule("layer", "self_attn.o_proj.weight", "attn_output.weight", "dq"),
    TensorRule("layer", "self_attn.g_proj.weight", "attn_gate.weight", "hd"),
    _norm_rule("layer", "self_attn.q_norm.weight", "attn_q_norm.weight", "e"),
    _norm_rule("layer", "self_attn.k_norm.weight", "attn_k_norm.weight", "e"),
    _norm_rule("layer", "post_attention_layernorm.weight", "ffn_norm.weight", "d"),
    TensorRule("dense", "mlp.gate_proj.weight", "ffn_gate.weight", "fd"),
    TensorRule("dense", "mlp.up_proj.weight", "ffn_up.weight", "fd"),
    TensorRule("dense", "mlp.down_proj.weight", "ffn_down.weight", "df"),
    TensorRule("moe", "moe.gate.weight", "ffn_gate_inp.weight", "nd"),
    TensorRule("moe", "moe.router_bias", "exp_probs_b.bias", "n"),
    TensorRule("moe", "moe.gate_proj.weight", "ffn_gate_exps.weight", "nxd"),
    TensorRule("moe", "moe.up_proj.weight", "ffn_up_exps.weight", "nxd"),
    TensorRule("moe", "moe.down_proj.weight", "ffn_down_exps.weight", "ndx"),
    TensorRule("moe", "share_expert.gate_proj.weight", "ffn_gate_shexp.weight", "sd"),
    TensorRule("moe", "share_expert.up_proj.weight", "ffn_up_shexp.weight", "sd"),
    TensorRule("moe", "share_expert.down_proj.weight", "ffn_down_shexp.weight", "ds"),
    _norm_rule("mtp", "enorm.weight", "nextn.enorm.weight", "d"),
    _norm_rule("mtp", "hnorm.weight", "nextn.hnorm.weight", "d"),
    TensorRule("mtp", "eh_proj.weight", "nextn.eh_proj.weight", "dD"),
    _norm_rule("mtp", "transformer.shared_head.norm.weight", "nextn.shared_head_norm.weight", "d"),
    TensorRule("mtp", "transformer.shared_head.output.weight", "nextn.shared_head_head.weight", "vd"),
)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor of one model: what a source calls it and what a GGUF does; shape in numpy order.

    In a GGUF as the source both names are the same. `plus_one`: the source stores it minus one.
    """

    source: str
    name: TensorName
    shape: tuple[int, ...]
    is_mtp: bool
    plus_one: bool = False

    @property
    def role(self) -> str:
        """The name's role, by which rules are written."""
        return self.name.role

    @property
    def layer(self) -> int | None:
        """The layer; None outside the layers."""
        return self.name.layer

    @property
    def is_quantizable(self) -> bool:
        """llama-quantize's rule: weights with two or more dimensions, but no norms and no router. The rest is F32."""
        return any(size > 1 for size in self.shape[:-1]) and _is_quantizable(self.name)


def quantizable_roles(*places: str) -> tuple[str, ...]:
    """The roles of what can be quantized in these places (`TensorRule.where`), in the table's order."""
    return tuple(TensorName(rule.name).role for rule in TENSORS if rule.where in places and rule.is_quantizable)


def _is_quantizable(name: TensorName) -> bool:
    return name.endswith(".weight") and not name.role.endswith("_norm") and name.role != "ffn_gate_inp"


def tensor_specs(hp: HParams) -> list[TensorSpec]:
    """Every tensor that a checkpoint with these hparams has, trunk and MTP, in llama-quantize's order."""
    specs = [_make_spec(rule, hp, None) for rule in TENSORS if rule.where == "model"]
    for layer in hp.layers:
        places = {"layer", "moe" if layer.is_moe else "dense"} | ({"mtp"} if layer.is_mtp else set())
        specs += [_make_spec(rule, hp, layer) for rule in TENSORS if rule.where in places]
    return sorted(specs, key=lambda spec: spec.name.file_order)


def _make_spec(rule: TensorRule, hp: HParams, layer: Layer | None) -> TensorSpec:
    sizes = {
        "d": hp.hidden_size, "D": 2 * hp.hidden_size, "f": hp.intermediate_size, "x": hp.expert_size,
        "s": hp.shared_expert_size, "n": hp.n_expert, "v": hp.vocab_size, "e": hp.head_dim,
    }  # fmt: skip
    if layer is not None:
        sizes |= {"h": layer.n_head, "q": layer.n_head * hp.head_dim, "k": layer.n_head_kv * hp.head_dim}
    return TensorSpec(
        source=rule.source if layer is None else f"model.layers.{layer.index}.{rule.source}",
        name=TensorName(rule.name if layer is None else f"blk.{layer.index}.{rule.name}"),
        shape=tuple(sizes[letter] for letter in rule.shape),
        is_mtp=layer is not None and layer.is_mtp,
        plus_one=rule.plus_one,
    )
