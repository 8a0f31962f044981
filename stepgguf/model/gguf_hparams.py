"""GGUFHParams: what the keys step35.* of a GGUF say of its model, by the names that HParams has.

A value is read when it is asked for and not before: files of other programs leave keys out, and quantizing asks for
three of them where the arithmetic of memory asks for ten and the forward pass for all.
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
_ROPE_THETA = 10000.0


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
        return self._read_number("expert_weights_scale", default=1.0)

    @property
    def router_norm(self) -> bool:
        """Whether a token's expert weights are divided by their sum; llama.cpp's default is no."""
        norm = self._read_value("expert_weights_norm", default=False)
        if not isinstance(norm, bool):
            raise self._wrong_value("expert_weights_norm", norm, "true or false")
        return norm

    @property
    def n_dense(self) -> int:
        """Layers before the first one with experts."""
        return self._read_count("leading_dense_block_count")

    @property
    def gqa(self) -> int:
        """Attention heads of layer 0 for each of its KV heads. The counts may be one number for all layers."""
        return self._layer_0_count("attention.head_count") // max(1, self._layer_0_count("attention.head_count_kv"))

    @property
    def heads(self) -> list[int]:
        """Attention heads of each layer, MTP blocks included."""
        return self._read_per_layer("attention.head_count")

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
    def shared_expert_size(self) -> int:
        """Hidden units of the shared expert."""
        return self._read_count("expert_shared_feed_forward_length")

    @property
    def vocab_size(self) -> int:
        """Tokens of the vocabulary, which the embedding and the output have a row for."""
        tokens = self._header.get("tokenizer.ggml.tokens")
        if not isinstance(tokens, list):
            raise BadMetadata(f"{self._header.path}: the key tokenizer.ggml.tokens is missing", hint=_AGAIN)
        return len(tokens)

    @property
    def bos_token_id(self) -> int:
        """The token that begins a text."""
        return self._checked_count("bos_token_id", self._header.get("tokenizer.ggml.bos_token_id"), "tokenizer.ggml")

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a turn or a text, as far as keys name them."""
        ends = (self._header.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
        return tuple(token for token in ends if token is not None)

    @property
    def rms_norm_eps(self) -> float:
        """What RMS norms add to the mean square."""
        return self._read_number("attention.layer_norm_rms_epsilon")

    @property
    def rope_theta_full(self) -> float:
        """The RoPE base of full-attention layers; llama.cpp's default for both kinds is 10,000."""
        return self._read_number("rope.freq_base", default=_ROPE_THETA)

    @property
    def rope_theta_sliding(self) -> float:
        """The RoPE base of sliding-attention layers."""
        return self._read_number("rope.freq_base_swa", default=_ROPE_THETA)

    @property
    def clamps(self) -> list[float]:
        """The SwiGLU limit of each layer's routed experts; 0 is none."""
        return self._read_limits("swiglu_clamp_exp")

    @property
    def clamps_shared(self) -> list[float]:
        """The SwiGLU limit of each layer's shared expert or dense MLP; 0 is none."""
        return self._read_limits("swiglu_clamp_shexp")

    @property
    def expert_gating(self) -> int:
        """The router's function, a gguf.ExpertGatingFuncType; 0, which is llama.cpp's default, means the sigmoid."""
        return self._read_count("expert_gating_func", default=0)

    @property
    def max_position(self) -> int:
        """Tokens of context that the model is made for."""
        return self._read_count("context_length")

    def _layer_0_count(self, key: str) -> int:
        value = self._read_value(key)
        return self._checked_count(key, value[0] if isinstance(value, list) and value else value)

    def _read_count(self, key: str, default: int | None = None) -> int:
        return self._checked_count(key, self._read_value(key, default))

    def _checked_count(self, key: str, value: Any, prefix: str | None = None) -> int:
        if not isinstance(value, int) or value < 0:
            raise self._wrong_value(key, value, "a count", prefix)
        return value

    def _read_per_layer(self, key: str) -> list[int]:
        """A value for each layer; the key may have one for all."""
        value, n = self._read_value(key), self._n_blocks()
        values = value if isinstance(value, list) else [value] * n
        if len(values) < n or not all(isinstance(v, int) and v >= 0 for v in values):
            raise self._wrong_value(key, value, f"a count for each of {n} layers")
        return values

    def _read_number(self, key: str, default: float | None = None) -> float:
        return self._checked_number(key, self._read_value(key, default))

    def _read_limits(self, key: str) -> list[float]:
        """A number for each layer; 0 for all without the key."""
        value, n = self._read_value(key, default=0.0), self._n_blocks()
        values = value if isinstance(value, list) else [value] * n
        if len(values) < n:
            raise self._wrong_value(key, value, f"a number for each of {n} layers")
        return [self._checked_number(key, limit) for limit in values[:n]]

    def _checked_number(self, key: str, value: Any) -> float:
        if not isinstance(value, float) or not math.isfinite(value):
            raise self._wrong_value(key, value, "a number")
        return value

    def _n_blocks(self) -> int:
        n = self._read_count("block_count")
        if n > MAX_LAYERS:  # before a list of so many is made
            raise self._wrong_value("block_count", n, f"at most {MAX_LAYERS}")
        return n

    def _read_value(self, key: str, default: Any = None) -> Any:
        value = self._header.get(f"{self._prefix}.{key}", default)
        if value is None:
            raise BadMetadata(f"{self._header.path}: the key {self._prefix}.{key} is missing", hint=_AGAIN)
        return value

    def _wrong_value(self, key: str, value: Any, expected: str, prefix: str | None = None) -> BadMetadata:
        name = f"{prefix or self._prefix}.{key}"
        return BadMetadata(f"{self._header.path}: the key {name} is {shown(value)}, expected {expected}", hint=_AGAIN)
