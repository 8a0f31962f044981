"""What the memory arithmetic needs to know of a model, wherever the model is stored."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from stepgguf.errors import BadMetadata
from stepgguf.fit.memory import Footprint, LayerFootprint

if TYPE_CHECKING:
    from stepgguf.convert.sources.source import TensorSource


def footprint_of(source: TensorSource) -> Footprint:
    """The model as the source stores it. BadMetadata for a GGUF without the trunk, or one that lacks a key for this."""
    hp = source.hparams
    shapes: dict[str, tuple[int, ...]] = {spec.name: spec.shape for spec in source.specs}
    if "blk.0.attn_norm.weight" not in shapes or "token_embd.weight" not in shapes:
        what = "only MTP blocks" if any(".nextn." in name for name in shapes) else "no tensors of one"
        raise BadMetadata(f"{source.path}: holds no trunk, {what}", hint="Give the file with the trunk.")
    return Footprint(
        weights=_stored_bytes(source),
        layers=_layers(source),
        key_length=hp.key_length,
        value_length=hp.value_length,
        sliding_window=hp.sliding_window,
        n_embd=hp.hidden_size,
        n_ff=hp.intermediate_size,
        n_vocab=shapes["token_embd.weight"][0],
        n_expert_used=hp.n_expert_used,
        expert_size=hp.expert_size,
        n_ctx_train=hp.max_position,
    )


def with_mtp_file(model: Footprint, mtp_file: TensorSource) -> Footprint:
    """The model with the MTP blocks of another file, which repeats the embedding and the output."""
    layers = tuple(layer for layer in _layers(mtp_file) if layer.is_mtp)
    if not layers:
        raise BadMetadata(f"{mtp_file.path}: holds no MTP blocks", hint="Give what `convert --mtp separate` wrote.")
    return replace(model, weights=model.weights + _stored_bytes(mtp_file), layers=(*model.layers, *layers))


def _stored_bytes(source: TensorSource) -> int:
    return sum(tensor.n_bytes for tensor in source.tensors.values())


def _layers(source: TensorSource) -> tuple[LayerFootprint, ...]:
    """The layers whose tensors are there, in order: a GGUF of the trunk or of MTP blocks has keys for all of them."""
    names = {spec.name for spec in source.specs}
    hp = source.hparams
    return tuple(
        LayerFootprint(n_head, n_head_kv, is_sliding, f"blk.{i}.nextn.eh_proj.weight" in names)
        for i, (n_head, n_head_kv, is_sliding) in enumerate(zip(hp.heads, hp.kv_heads, hp.sliding_layers, strict=False))
        if f"blk.{i}.attn_norm.weight" in names
    )
