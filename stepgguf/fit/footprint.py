"""What the memory arithmetic needs to know of a model, wherever the model is stored."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from stepgguf.errors import BadMetadata
from stepgguf.fit.memory import Footprint, LayerFootprint

if TYPE_CHECKING:
    from stepgguf.convert.sources.gguf_file import GGUFSource
    from stepgguf.model.hparams import HParams


def checkpoint_footprint(hp: HParams) -> Footprint:
    """Of a checkpoint, with MTP blocks. The weights' size is not known before there is a type: 0."""
    return Footprint(
        weights=0,
        layers=tuple(LayerFootprint(layer.n_head_kv, layer.is_sliding, layer.is_mtp) for layer in hp.layers),
        key_length=hp.head_dim,
        value_length=hp.head_dim,
        sliding_window=hp.sliding_window,
        n_embd=hp.hidden_size,
        n_ff=hp.intermediate_size,
        n_vocab=hp.vocab_size,
        n_expert_used=hp.n_expert_used,
        expert_size=hp.expert_size,
        n_ctx_train=hp.max_position,
    )


def footprint(source: GGUFSource) -> Footprint:
    """What the memory arithmetic needs of a GGUF's keys and tensors."""
    if "blk.0.attn_norm.weight" not in source.tensors or "token_embd.weight" not in source.tensors:
        what = "only MTP blocks" if any(".nextn." in name for name in source.tensors) else "no tensors of one"
        raise BadMetadata(f"{source.path}: holds no trunk, {what}", hint="Give the file with the trunk.")
    return Footprint(
        weights=_weights(source),
        layers=_layers(source),
        key_length=_number(source, "attention.key_length"),
        value_length=_number(source, "attention.value_length"),
        sliding_window=_number(source, "attention.sliding_window"),
        n_embd=_number(source, "embedding_length"),
        n_ff=_number(source, "feed_forward_length"),
        n_vocab=source.tensors["token_embd.weight"].shape[0],
        n_expert_used=_number(source, "expert_used_count"),
        expert_size=_number(source, "expert_feed_forward_length"),
        n_ctx_train=_number(source, "context_length"),
    )


def with_heads(model: Footprint, heads: GGUFSource) -> Footprint:
    """The model with the MTP blocks of another file, which repeats the embedding and the output."""
    layers = tuple(layer for layer in _layers(heads) if layer.is_mtp)
    if not layers:
        raise BadMetadata(f"{heads.path}: holds no MTP blocks", hint="Give what `convert --mtp separate` wrote.")
    return replace(model, weights=model.weights + _weights(heads), layers=(*model.layers, *layers))


def _weights(source: GGUFSource) -> int:
    return sum(tensor.n_bytes for header in source.headers for tensor in header.tensors)


def _layers(source: GGUFSource) -> tuple[LayerFootprint, ...]:
    """The layers whose tensors are there, in order."""
    n = _number(source, "block_count")
    here = [i for i in range(min(n, len(source.tensors))) if f"blk.{i}.attn_norm.weight" in source.tensors]
    sliding = _per_layer(source, "attention.sliding_window_pattern", n)
    kv = _per_layer(source, "attention.head_count_kv", n)
    return tuple(
        LayerFootprint(kv[i], bool(sliding[i]), f"blk.{i}.nextn.eh_proj.weight" in source.tensors) for i in here
    )


def _number(source: GGUFSource, name: str) -> int:
    value = _value(source, name)
    if not isinstance(value, int) or value < 0:
        raise _bad(source, name, "is no count")
    return value


def _per_layer(source: GGUFSource, name: str, n: int) -> list[int]:
    """One value a layer; a file may have one for all."""
    value = _value(source, name)
    values = value if isinstance(value, list) else [value] * n
    if len(values) < n or not all(isinstance(v, int) and v >= 0 for v in values):
        raise _bad(source, name, f"is no list of {n} counts")
    return values


def _value(source: GGUFSource, name: str) -> Any:
    if f"step35.{name}" not in source.keys:
        raise _bad(source, name, "is missing")
    return source.keys[f"step35.{name}"].value


def _bad(source: GGUFSource, name: str, what: str) -> BadMetadata:
    return BadMetadata(f"{source.path}: the key step35.{name} {what}", hint="Convert the model again.")
