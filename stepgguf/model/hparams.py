"""HParams: what config.json says, checked and spread over the layers; and GGUFHParams, what a GGUF's keys say of it.

config.json is parsed as JSON and never through transformers' AutoConfig, which since 5.16 rewrites it. Three spellings:

    Step-3.5      flat                 architectures: [Step3p5ForCausalLM]
    Step-3.7      under "text_config"  architectures: [Step3p7ForConditionalGeneration]; lacks use_qk_norm,
                                       zero_centered and tie_word_embeddings although the weights are the same
    transformers  either               what save_pretrained of 5.16 and later writes: other names (layers.ALIASES), MoE
                                       layers as mlp_layer_types, RoPE as rope_parameters by layer type

layers.py reads what is said of each layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from stepgguf.errors import BadConfig, UnsupportedModel
from stepgguf.files.jsonread import Value, shown
from stepgguf.model.gguf_hparams import GGUFHParams
from stepgguf.model.layers import (
    MAX_EXPERTS,
    MAX_FLOAT,
    MAX_LAYERS,
    MAX_SIZE,
    Layer,
    RopeScaling,
    read_aliased,
    read_integer,
    read_integers,
    read_layers,
    read_number,
    read_rope_scaling,
)

if TYPE_CHECKING:
    from stepgguf.files.gguf_header import Header

ARCHITECTURE = "step35"  # what a GGUF's general.architecture is
CHECKPOINT_ARCHITECTURES = ("Step3p5ForCausalLM", "Step3p7ForConditionalGeneration")

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
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "att_impl_type": "GQA",
    "moe_router_activation": "sigmoid",
    "moe_every_n_layer": 1,
    "moe_layer_offset": 0,
}


@dataclass(frozen=True, slots=True)
class HParams:
    """A checkpoint's model, with or without MTP blocks. `layers` has the trunk's n_layer, then the n_mtp MTP blocks."""

    architecture: str  # one of CHECKPOINT_ARCHITECTURES
    vocab_size: int
    hidden_size: int
    intermediate_size: int  # hidden units of a dense MLP
    head_dim: int
    n_layer: int  # of the trunk
    n_mtp: int
    n_expert: int
    n_expert_used: int  # by a token
    expert_size: int  # hidden units of a routed expert
    shared_expert_size: int
    router_scale: float  # the sum of a token's expert weights, where router_norm is set
    router_norm: bool
    sliding_window: int  # tokens that a sliding-attention layer sees
    rms_norm_eps: float
    max_position: int  # tokens of context that the model is made for
    rope_scaling: RopeScaling | None
    bos_token_id: int
    eos_token_ids: tuple[int, ...]
    layers: tuple[Layer, ...]

    @property
    def trunk_layers(self) -> tuple[Layer, ...]:
        """The layers that a token's next one is computed by; MTP blocks only guess further."""
        return self.layers[: self.n_layer]

    @property
    def rope_theta_full(self) -> float:
        """The RoPE base of full-attention layers, which is one number: read_layers makes sure."""
        return next(layer.rope_theta for layer in self.layers if not layer.is_sliding)

    @property
    def rope_theta_sliding(self) -> float:
        """The RoPE base of sliding-attention layers."""
        return next(layer.rope_theta for layer in self.layers if layer.is_sliding)

    # Views by the names that GGUFHParams has too: code that takes AnyHParams, a checkpoint's or a GGUF's, reads these.

    @property
    def gqa(self) -> int:
        """Attention heads of layer 0 for each of its KV heads."""
        return self.layers[0].n_head // self.layers[0].n_head_kv

    @property
    def heads(self) -> list[int]:
        """Attention heads of each layer, MTP blocks included."""
        return [layer.n_head for layer in self.layers]

    @property
    def kv_heads(self) -> list[int]:
        """KV heads of each layer, MTP blocks included."""
        return [layer.n_head_kv for layer in self.layers]

    @property
    def sliding_layers(self) -> list[bool]:
        """Whether each layer has sliding-window attention."""
        return [layer.is_sliding for layer in self.layers]

    @property
    def key_length(self) -> int:
        """Values of a KV head's key for one token."""
        return self.head_dim

    @property
    def value_length(self) -> int:
        """Values of a KV head's value for one token."""
        return self.head_dim

    @staticmethod
    def from_gguf(header: Header) -> GGUFHParams:
        """What the first file of a GGUF says. Nothing is demanded of it yet: each value is read when it is used."""
        return GGUFHParams(header)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], document: str = "config.json") -> HParams:
        """Read a parsed config.json; `document` names it in errors.

        Raises UnsupportedModel for another architecture, BadConfig for a bad value.
        """
        root = Value(dict(config), document, BadConfig, "Take config.json from the model's repository.")
        architecture = _known_architecture(root)
        text = root.get("text_config") or root
        _check_fixed(text)
        n_layer = text["num_hidden_layers"].integer(1, MAX_LAYERS)
        n_mtp = read_integer(text, "num_nextn_predict_layers", 0, MAX_LAYERS - n_layer, default=0)
        head_dim = text["head_dim"].integer(4, MAX_SIZE)
        if head_dim % 4:
            raise text["head_dim"].wrong("a multiple of 4: full-attention layers rotate half of it, in pairs")
        scale = text.get("query_pre_attn_scalar")
        if scale is not None and scale.number() != head_dim:
            raise UnsupportedModel(f"{scale.document}: {scale.place} is {shown(scale.raw)}; only head_dim is known")
        n_expert = read_aliased(text, "moe_num_experts").integer(1, MAX_EXPERTS)
        return cls(
            architecture=architecture,
            vocab_size=text["vocab_size"].integer(1, MAX_SIZE),
            hidden_size=text["hidden_size"].integer(1, MAX_SIZE),
            intermediate_size=text["intermediate_size"].integer(1, MAX_SIZE),
            head_dim=head_dim,
            n_layer=n_layer,
            n_mtp=n_mtp,
            n_expert=n_expert,
            n_expert_used=read_aliased(text, "moe_top_k").integer(1, n_expert),
            expert_size=text["moe_intermediate_size"].integer(1, MAX_SIZE),
            shared_expert_size=text["share_expert_dim"].integer(1, MAX_SIZE),
            router_scale=read_number(text, "moe_router_scaling_factor", -MAX_FLOAT, MAX_FLOAT, default=1.0),
            router_norm=norm.flag() if (norm := text.get("norm_expert_weight")) is not None else True,
            sliding_window=text["sliding_window"].integer(1, MAX_SIZE),
            rms_norm_eps=read_number(text, "rms_norm_eps", 0.0, 1.0, default=1e-5),
            max_position=text["max_position_embeddings"].integer(1, MAX_SIZE),
            rope_scaling=read_rope_scaling(text),
            bos_token_id=(text.get("bos_token_id") or root["bos_token_id"]).integer(0, MAX_SIZE),
            eos_token_ids=read_integers(text.get("eos_token_id") or root["eos_token_id"], MAX_SIZE),
            layers=read_layers(text, n_layer, n_mtp),
        )

    def without_mtp(self) -> HParams:
        """The same model without MTP blocks."""
        return replace(self, n_mtp=0, layers=self.trunk_layers)


AnyHParams = HParams | GGUFHParams  # of a checkpoint, or of a GGUF


def _known_architecture(config: Value) -> str:
    """The class of the model. UnsupportedModel if it is none that this program knows."""
    names = config.raw.get("architectures")
    for name in names if isinstance(names, list) else ():
        if name in CHECKPOINT_ARCHITECTURES:
            return str(name)
    found = ", ".join(map(str, names)) if isinstance(names, list) else shown(names)
    raise UnsupportedModel(
        f"{config.document}: architectures is {found[:200] or 'empty'}, expected one of "
        f"{', '.join(CHECKPOINT_ARCHITECTURES)}",
        hint="stepgguf converts Step-3.5-Flash and the text part of Step-3.7-Flash only.",
    )


def _check_fixed(text: Value) -> None:
    """UnsupportedModel for a switch that is set otherwise than in every published checkpoint."""
    for key, value in FIXED.items():
        found = text.get(key)
        if found is not None and found.raw != value:
            raise UnsupportedModel(
                f"{found.document}: {found.place} is {shown(found.raw)}; stepgguf and llama.cpp know only {value!r}",
                hint="This checkpoint is a variant that no published Step-3.x model uses.",
            )
