"""llama.cpp's stock mixtures (Q4_K_M, IQ4_XS, ...), type by type as llama-quantize chooses them for step35.

The rules are those of llama_tensor_get_type_impl in llama.cpp's src/llama-quant.cpp (commit 0c1e5709), with the
branches of other architectures left out and its quirks kept, because the aim is the same file:

* ffn_down, ffn_down_exps and ffn_down_shexp are one category, so the shared expert gets the routed experts' type;
* at 1 and 2 bits the counter of that category counts tensors, not layers, so shared experts use it up;
* the bumps for MoE models test for exactly 8 experts, which is Mixtral and never Step;
* layers are counted over the trunk only. llama-quantize counts MTP layers too, and so changes the trunk's types when
  a file carries them; here the trunk's mixture never depends on them.

Tensors must come in llama-quantize's order: outside the layers first, then layer by layer, by name within a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gguf import GGMLQuantizationType, LlamaFileType

from stepgguf.model.tensors import TensorSpec
from stepgguf.quants.types import FLOATS, fitting_type, quant_type

T = GGMLQuantizationType

# A mixture's name -> the type that it starts from (llama_ftype_get_default_type).
BASE_TYPES: dict[str, GGMLQuantizationType] = {
    "F32": T.F32, "F16": T.F16, "BF16": T.BF16, "Q4_0": T.Q4_0, "Q4_1": T.Q4_1, "Q5_0": T.Q5_0, "Q5_1": T.Q5_1,
    "Q8_0": T.Q8_0, "Q2_K": T.Q2_K, "Q2_K_S": T.Q2_K, "Q3_K_S": T.Q3_K, "Q3_K_M": T.Q3_K, "Q3_K_L": T.Q3_K,
    "Q4_K_S": T.Q4_K, "Q4_K_M": T.Q4_K, "Q5_K_S": T.Q5_K, "Q5_K_M": T.Q5_K, "Q6_K": T.Q6_K, "IQ1_S": T.IQ1_S,
    "IQ1_M": T.IQ1_M, "IQ2_XXS": T.IQ2_XXS, "IQ2_XS": T.IQ2_XS, "IQ2_S": T.IQ2_XS, "IQ2_M": T.IQ2_S,
    "IQ3_XXS": T.IQ3_XXS, "IQ3_XS": T.IQ3_S, "IQ3_S": T.IQ3_S, "IQ3_M": T.IQ3_S, "IQ4_NL": T.IQ4_NL,
    "IQ4_XS": T.IQ4_XS, "TQ1_0": T.TQ1_0, "TQ2_0": T.TQ2_0, "MXFP4_MOE": T.MXFP4,
}  # fmt: skip

# Mixtures of 1 and 2 bits, which have rules of their own.
_LOW_BITS = ("IQ2_XXS", "IQ2_XS", "IQ1_S", "IQ2_S", "IQ2_M", "IQ1_M")


@dataclass(frozen=True, slots=True)
class RuleFacts:
    """What the rules ask about the model. gqa is layer 0's heads per kv head."""

    n_layer: int
    n_expert: int
    gqa: int


@dataclass(frozen=True, slots=True)
class TypeChoice:
    """A tensor's type, and why it has it, for people."""

    ggml_type: GGMLQuantizationType
    reason: str


def file_type(name: str) -> LlamaFileType:
    """general.file_type of the mixture."""
    return LlamaFileType["ALL_F32" if name == "F32" else f"MOSTLY_{name}"]


def file_type_name(number: int) -> str | None:
    """What llama.cpp calls this general.file_type: Q4_K_M; None if it knows none."""
    names = {file_type.value: file_type.name for file_type in LlamaFileType}
    return names[number].removeprefix("MOSTLY_").removeprefix("ALL_") if number in names else None


def nearest_file_type(ggml_type: GGMLQuantizationType) -> LlamaFileType:
    """general.file_type of a file that is mostly `ggml_type`: of the smallest mixture on that base."""
    return file_type(next(name for name, base in BASE_TYPES.items() if base == ggml_type))


def choose_types(
    name: str, tensors: Sequence[TensorSpec], facts: RuleFacts, *, has_imatrix: bool = False
) -> list[TypeChoice]:
    """The type of each tensor in this mixture and why, in the order given, which must be llama-quantize's."""
    mixture = _Mixture(name, facts, has_imatrix, n_attn_v=sum(t.role == "attn_v" for t in tensors))
    return [mixture.choose_type(tensor) for tensor in tensors]


def requires_imatrix(name: str, tensor: TensorSpec, ggml_type: GGMLQuantizationType) -> bool:
    """Whether llama-quantize refuses this type for the tensor without an importance matrix. name: the mixture."""
    if tensor.role in ("token_embd", "output"):
        return False
    return quant_type(ggml_type).imatrix or (ggml_type == T.Q2_K and name == "Q2_K_S")


def _gets_more_bits(layer: int, n_layer: int) -> bool:
    """The layers that Q4_K_M and Q5_K_M favour: first eighth, last eighth, every third between."""
    return layer < n_layer // 8 or layer >= 7 * n_layer // 8 or (layer - n_layer // 8) % 3 == 2


class _Mixture:
    """One run over a model's tensors. The rules count tensors as they come, so one object serves one run."""

    def __init__(self, name: str, facts: RuleFacts, has_imatrix: bool, n_attn_v: int) -> None:
        self.name, self.facts, self.has_imatrix, self.n_attn_v = name, facts, has_imatrix, n_attn_v
        self.base = BASE_TYPES[name]
        self.seen_attn_v = self.seen_ffn_down = 0

    def choose_type(self, tensor: TensorSpec) -> TypeChoice:
        """The tensor's type, or what takes its place on rows that its blocks do not divide."""
        if self.base in FLOATS:
            return TypeChoice(self.base, f"{self.name} throughout")
        ggml_type, reason = self._choose_by_rules(tensor)
        fitting = fitting_type(ggml_type, tensor.shape[-1])
        if fitting != ggml_type:
            reason = f"rows of {tensor.shape[-1]} do not divide into {ggml_type.name} blocks"
        return TypeChoice(fitting, reason)

    def _choose_by_rules(self, tensor: TensorSpec) -> tuple[GGMLQuantizationType, str]:
        base = self.base, f"{self.name} base"
        if tensor.role == "output":
            return self._output(tensor)
        if self.name == "MXFP4_MOE":
            return (T.MXFP4, "routed experts") if len(tensor.shape) == 3 else (T.Q8_0, "all but routed experts")
        if tensor.role == "token_embd":
            return self._token_embd() or base
        category = next((c for c in _CATEGORIES if tensor.role.startswith(c)), None)
        if category is None or tensor.layer is None:
            return base
        return (self._low_bits(category) if self.name in _LOW_BITS else _CATEGORIES[category](self, tensor)) or base

    def _output(self, tensor: TensorSpec) -> tuple[GGMLQuantizationType, str]:
        if self.name == "MXFP4_MOE" or not quant_type(self.base).divides(tensor.shape[-1]):
            return T.Q8_0, "output"
        if self.name in ("IQ2_XXS", "IQ2_XS", "IQ3_XXS", "IQ1_S", "IQ2_S", "IQ2_M", "IQ1_M"):
            return T.Q5_K, "output"
        return (T.Q8_0, f"{self.name} base") if self.base == T.Q8_0 else (T.Q6_K, "output")

    def _token_embd(self) -> tuple[GGMLQuantizationType, str] | None:
        if self.name in ("IQ2_XXS", "IQ2_XS", "IQ1_S", "IQ1_M"):
            return T.Q2_K, "embeddings"
        if self.name in ("IQ2_S", "IQ2_M", "IQ3_XXS"):
            return T.IQ3_S, "embeddings"
        if self.name in ("TQ1_0", "TQ2_0"):
            return T.Q4_K, "embeddings"
        return None

    def _low_bits(self, category: str) -> tuple[GGMLQuantizationType, str] | None:
        """The rules of mixtures of 1 and 2 bits, for all categories."""
        at_2_bits = self.name in ("IQ2_S", "IQ2_M")
        if category == "attn_v":
            if self.facts.gqa >= 4 or self.facts.n_expert >= 4:
                return T.Q4_K, "attn_v of a MoE model"
            return (T.IQ3_S if at_2_bits else T.Q2_K), "attn_v"
        if category == "attn_k" and self.facts.n_expert == 8:
            return T.Q4_K, "attn_k of an 8-expert model"
        if category == "ffn_down":
            self.seen_ffn_down += 1
            if self.seen_ffn_down <= self.facts.n_layer // 8:
                return (T.IQ3_S if at_2_bits else T.Q2_K), "one of the first ffn_down tensors"
        if category == "attn_output":
            if self.facts.n_expert == 8:
                return T.Q5_K, "attn_output of an 8-expert model"
            if self.name in ("IQ1_S", "IQ1_M"):
                return T.IQ2_XXS, "attn_output"
            if at_2_bits:
                return T.IQ3_S, "attn_output"
        return None

    def _attn_v(self, tensor: TensorSpec) -> tuple[GGMLQuantizationType, str] | None:
        i, self.seen_attn_v = self.seen_attn_v, self.seen_attn_v + 1
        if self.facts.n_expert == 8:
            return T.Q8_0, "attn_v of an 8-expert model"
        wide = self.facts.gqa >= 4
        match self.name:
            case "Q2_K":
                return (T.Q4_K if wide else T.Q3_K), "attn_v"
            case "IQ3_XXS":
                return (T.Q4_K if wide else T.IQ3_XXS if self.has_imatrix else T.IQ3_S), "attn_v"
            case "Q2_K_S" | "IQ3_XS" | "IQ3_S" if wide:
                return T.Q4_K, "attn_v, 4 or more heads share it"
            case "IQ4_NL" | "IQ4_XS" if wide:
                return T.Q5_K, "attn_v, 4 or more heads share it"
            case "IQ3_M":
                return T.Q4_K, "attn_v"
            case "Q3_K_M":
                return (T.Q5_K, "attn_v of the first 2 layers") if i < 2 else (T.Q4_K, "attn_v")
            case "Q3_K_L":
                return T.Q5_K, "attn_v"
            case "Q4_K_M" | "Q5_K_M" if _gets_more_bits(i, self.n_attn_v):
                return T.Q6_K, "more bits: first and last eighth, every third between"
            case "Q4_K_S" if i < 4:
                return T.Q5_K, "attn_v of the first 4 layers"
        return None

    def _attn_qk(self, tensor: TensorSpec) -> tuple[GGMLQuantizationType, str] | None:
        if tensor.role == "attn_k" and self.facts.n_expert == 8:
            return T.Q8_0, "attn_k of an 8-expert model"
        if self.name == "IQ3_XS":
            return T.IQ3_XXS, "attn_q and attn_k"
        return (T.IQ2_S, "attn_q and attn_k") if self.name == "IQ3_XXS" else None

    def _attn_output(self, tensor: TensorSpec) -> tuple[GGMLQuantizationType, str] | None:
        if self.facts.n_expert == 8:
            favoured = ("Q2_K", "IQ3_XS", "IQ3_XXS", "Q3_K_S", "Q3_K_M", "IQ4_NL", "Q4_K_S", "Q4_K_M", "IQ3_S",
                        "IQ3_M", "IQ4_XS")  # fmt: skip
            return (T.Q5_K, "attn_output of an 8-expert model") if self.name in favoured else None
        one_up = {"Q2_K": T.Q3_K, "IQ3_XXS": T.IQ3_S, "Q3_K_M": T.Q4_K, "Q3_K_L": T.Q5_K, "IQ3_M": T.Q4_K}
        return (one_up[self.name], "attn_output") if self.name in one_up else None

    def _ffn_down(self, tensor: TensorSpec) -> tuple[GGMLQuantizationType, str] | None:
        assert tensor.layer is not None
        layer, n = tensor.layer, self.facts.n_layer
        first = layer < n // 8
        early = "ffn_down of the first eighth of the layers"
        match self.name:
            case "Q2_K":
                return T.Q3_K, "ffn_down"
            case "Q2_K_S" if first:
                return T.Q4_K, early
            case "IQ3_XXS" if not self.has_imatrix:
                return (T.Q4_K, early) if first else (T.Q3_K, "ffn_down")
            case "Q3_K_M":
                return (T.Q5_K, "ffn_down of the first sixteenth") if layer < n // 16 else (T.Q4_K, "ffn_down")
            case "IQ3_M" if first or (self.facts.n_expert == 8 and _gets_more_bits(layer, n)):
                return T.Q4_K, early
            case "Q3_K_L":
                return T.Q5_K, "ffn_down"
            case "Q4_K_M" | "Q5_K_M" if _gets_more_bits(layer, n):
                return T.Q6_K, "more bits: first and last eighth, every third between"
            case "IQ4_NL" | "IQ4_XS" if first and not self.has_imatrix:
                return T.Q5_K, early
            case "Q4_K_S" if first:
                return T.Q5_K, early
            case "Q4_0" if first and self.has_imatrix:
                return T.Q4_1, early
            case "Q5_0" if first and self.has_imatrix:
                return T.Q5_1, early
        return None

    def _ffn_gate_up(self, tensor: TensorSpec) -> tuple[GGMLQuantizationType, str] | None:
        assert tensor.layer is not None
        n = self.facts.n_layer
        if self.name == "IQ3_XS" and n // 8 <= tensor.layer < 7 * n // 8:
            return T.IQ3_XXS, "ffn_gate and ffn_up of the middle layers"
        return None


_Rule = Callable[[_Mixture, TensorSpec], "tuple[GGMLQuantizationType, str] | None"]
_CATEGORIES: dict[str, _Rule] = {
    "attn_v": _Mixture._attn_v,
    "attn_k": _Mixture._attn_qk,
    "attn_q": _Mixture._attn_qk,
    "attn_output": _Mixture._attn_output,
    "ffn_up": _Mixture._ffn_gate_up,
    "ffn_gate": _Mixture._ffn_gate_up,
    "ffn_down": _Mixture._ffn_down,
}
