"""What the memory arithmetic needs to know of a model, wherever the model is stored."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stepgguf.errors import BadMetadata
from stepgguf.runtime.memory import Footprint, Layer

if TYPE_CHECKING:
    from stepgguf.convert.ggufsource import GGUFSource
    from stepgguf.model.hparams import HParams


def checkpoint_footprint(hp: HParams) -> Footprint:
    """Of a checkpoint, with MTP blocks. The weights' size is not known before there is a type: 0."""
    return Footprint(
        weights=0,
        layers=tuple(Layer(layer.n_head_kv, layer.is_sliding, layer.is_mtp) for layer in hp.layers),
        key_length=hp.head_dim,
        value_length=hp.head_dim,
        window=hp.sliding_window,
        n_embd=hp.hidden_size,
        n_ff=hp.intermediate_size,
        n_vocab=hp.vocab_size,
        n_expert_used=hp.n_expert_used,
        expert_size=hp.expert_size,
        n_ctx_train=hp.max_position,
    )


def footprint(source: GGUFSource) -> Footprint:
    """What the memory arithmetic needs of a GGUF's keys and tensors."""

    def key(name: str) -> Any:
        full = f"step35.{name}"
        if full not in source.keys:
            raise BadMetadata(f"{source.path}: the key {full} is missing", hint="Convert the model again.")
        return source.keys[full].value

    if "blk.0.attn_norm.weight" not in source.tensors:
        raise BadMetadata(f"{source.path}: holds no trunk, only MTP blocks", hint="Give the file with the trunk.")
    n_layer = sum(f"blk.{i}.attn_norm.weight" in source.tensors for i in range(key("block_count")))
    sliding = key("attention.sliding_window_pattern")
    kv = key("attention.head_count_kv")
    return Footprint(
        weights=sum(tensor.n_bytes for header in source.headers for tensor in header.tensors),
        layers=tuple(
            Layer(kv[i] if isinstance(kv, list) else kv, sliding[i], f"blk.{i}.nextn.eh_proj.weight" in source.tensors)
            for i in range(n_layer)
        ),
        key_length=key("attention.key_length"),
        value_length=key("attention.value_length"),
        window=key("attention.sliding_window"),
        n_embd=key("embedding_length"),
        n_ff=key("feed_forward_length"),
        n_vocab=source.tensors["token_embd.weight"].shape[0],
        n_expert_used=key("expert_used_count"),
        expert_size=key("expert_feed_forward_length"),
        n_ctx_train=key("context_length"),
    )
