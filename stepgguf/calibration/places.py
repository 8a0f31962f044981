"""The places of a layer at which its matrices read, each as a function of the layer, rows of its input and a mask.

Up to the middle, which is where attention has been added, the input is the layer's; behind it, the middle.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from stepgguf.reference.model import DecoderLayer

Place = Callable[[DecoderLayer, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False, slots=True)
class LayerPair:
    """The exact layer, and the one whose weights are replaced by what their codes stand for."""

    exact: DecoderLayer
    quantized: DecoderLayer


def attention_in(layer: DecoderLayer, x: Tensor, mask: Tensor) -> Tensor:
    normed: Tensor = layer.input_layernorm(x)
    return normed


def attention_out(layer: DecoderLayer, x: Tensor, mask: Tensor) -> Tensor:
    return layer.self_attn.mix(layer.input_layernorm(x), mask)


def attend(layer: DecoderLayer, x: Tensor, mask: Tensor) -> Tensor:
    return layer.attend(x, mask)


def ffn_in(layer: DecoderLayer, x: Tensor, mask: Tensor) -> Tensor:
    normed: Tensor = layer.post_attention_layernorm(x)
    return normed


def ffn_out(layer: DecoderLayer, x: Tensor, mask: Tensor) -> Tensor:
    mlp = layer.share_expert if layer.spec.is_moe else layer.mlp
    return mlp.units(layer.post_attention_layernorm(x))


def resident_ffn(layer: DecoderLayer, x: Tensor, mask: Tensor) -> Tensor:
    """All that the layer gives but its routed experts' part."""
    mlp = layer.share_expert if layer.spec.is_moe else layer.mlp
    result: Tensor = x + mlp(layer.post_attention_layernorm(x))
    return result
