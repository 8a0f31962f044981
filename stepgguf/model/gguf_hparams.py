"""GGUFHParams: what the keys step35.* of a GGUF say of its model, by the names that HParams has.

A value is read when it is asked for and not before: files of other programs leave keys out, and quantizing asks for
three of them where the arithmetic of memory asks for ten.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from stepgguf.errors import BadMetadata
from stepgguf.files.jsonread import shown
from stepgguf.model.layers import MAX_LAYERS

if TYPE_CHECKING:
    from stepgguf.files.gguf_header import Header

_AGAIN = "Convert the model again."


class GGUFHParams:
    """The keys of a GGUF's first file. Each property raises BadMetadata where the file has no such value."""

    def __init__(self, header: Header) -> None:
        self._header = header
        self._prefix = header.get("general.architecture")  # what the keys about the model begin with

    @property
    def n_layer(self) -> int:
        """Layers of the trunk: block_count counts the MTP blocks too."""
        return self._read_count("block_count") - self.n_mtp

    @property
    def n_mtp(self) -> int:
        """MTP blocks among the layers; none in files that do not know the key."""
        return self._read_count("nextn_predict_layers", default=0)

    @property
    def n_expert(self) -> int:
        """Routed experts of a layer; 0 if the file says nothing, as of a dense model."""
        return self._read_count("expert_count", default=0)

    @property
    def n_expert_used(self) -> int:
        """Routed experts that a token uses."""
        return self._read_count("expert_used_count", default=0)

    @property
    def router_scale(self) -> float:
        """What a token's expert weights are multiplied by; 1 is llama.cpp's default too."""
        scale = self._read_value("expert_weights_scale", default=1.0)
        if not isinstance(scale, float) or not math.isfinite(scale):
            raise self._wrong_value("expert_weights_scale", scale, "a number")
        return scale

    @property
    def gqa(self) -> int:
        """Attention heads of layer 0 for each of its KV heads. The counts may be one number for all layers."""
        return self._layer_0_count("attention.head_count") // max(1, self._layer_0_count("attention.head_count_kv"))

    @property
    def kv_heads(self) -> list[int]:
        """KV heads of each layer, MTP blocks included."""
        return self._read_per_layer("attention.head_count_kv")

    @property
    def sliding_layers(self) -> list[bool]:
        """Whether each layer has sliding-window attention."""
        return [bool(value) for value in self._read_per_layer("attention.sliding_window_pattern")]

    @property
    def key_length(self) -> int:
        """Values of a KV head's key for one token."""
        return self._read_count("attention.key_length")

    @property
    def value_length(self) -> int:
        """Values of a KV head's value for one token."""
        return self._read_count("attention.value_length")

    @property
    def sliding_window(self) -> int:
        """Tokens that a sliding-attention layer sees."""
        return self._read_count("attention.sliding_window")

    @property
    def hidden_size(self) -> int:
        """Values of the residual stream for one token."""
        return self._read_count("embedding_length")

    @property
    def intermediate_size(self) -> int:
        """Hidden units of a dense MLP."""
        return self._read_count("feed_forward_length")

    @property
    def expert_size(self) -> int:
        """Hidden units of a routed expert."""
        return self._read_count("expert_feed_forward_length")

    @property
    def max_position(self) -> int:
        """Tokens of context that the model is made for."""
        return self._read_count("context_length")

    def _layer_0_count(self, key: str) -> int:
        value = self._read_value(key)
        return self._checked_count(key, value[0] if isinstance(value, list) and value else value)

    def _read_count(self, key: str, default: int | None = None) -> int:
        return self._checked_count(key, self._read_value(key, default))

    def _checked_count(self, key: str, value: Any) -> int:
        if not isinstance(value, int) or value < 0:
            raise self._wrong_value(key, value, "a count")
        return value

    def _read_per_layer(self, key: str) -> list[int]:
        """A value for each layer; the key may have one for all."""
        value, n = self._read_value(key), self._read_count("block_count")
        if n > MAX_LAYERS:  # before a list of so many is made
            raise self._wrong_value("block_count", n, f"at most {MAX_LAYERS}")
        values = value if isinstance(value, list) else [value] * n
        if len(values) < n or not all(isinstance(v, int) and v >= 0 for v in values):
            raise self._wrong_value(key, value, f"a count for each of {n} layers")
        return values

    def _read_value(self, key: str, default: Any = None) -> Any:
        value = self._header.get(f"{self._prefix}.{key}", default)
        if value is None:
            raise BadMetadata(f"{self._header.path}: the key {self._prefix}.{key} is missing", hint=_AGAIN)
        return value

    def _wrong_value(self, key: str, value: Any, expected: str) -> BadMetadata:
        return BadMetadata(
            f"{self._header.path}: the key {self._prefix}.{key} is {shown(value)}, expected {expected}", hint=_AGAIN
        )
