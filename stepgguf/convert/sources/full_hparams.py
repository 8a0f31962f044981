"""All hyperparameters of an opened source, as the forward pass needs them: a checkpoint's, or those of a GGUF's keys.

A GGUF says of RoPE scaling only what it divides each frequency by, which is a tensor (rope_freqs.weight), so the
`rope_scaling` of one is None; of end tokens it knows up to three.
"""

from __future__ import annotations

from gguf import ExpertGatingFuncType

from stepgguf.convert.sources.source import TensorSource
from stepgguf.errors import BadMetadata, UnsupportedModel
from stepgguf.model.gguf_hparams import GGUFHParams
from stepgguf.model.hparams import CHECKPOINT_ARCHITECTURES, HParams
from stepgguf.model.layers import Layer
from stepgguf.model.tensors import tensor_specs

_WHOLE = "Give a file that holds the whole model; MTP blocks that were written separately have no trunk."


def full_hparams(source: TensorSource) -> HParams:
    """The source's hyperparameters, with the MTP blocks that it has.

    Of a GGUF: BadMetadata for a key that is missing or cannot be, and for a tensor that is missing or has another shape
    than the keys imply; UnsupportedModel for a router without the sigmoid.
    """
    said = source.hparams
    if isinstance(said, HParams):
        return said
    if said.expert_gating not in (0, ExpertGatingFuncType.SIGMOID):
        raise UnsupportedModel(f"{source.path}: the router's function is {said.expert_gating}, expected 2, the sigmoid")
    hp = _from_keys(said)
    if not any(spec.is_mtp for spec in source.specs):
        hp = hp.without_mtp()
    _check_tensors(source, hp)
    return hp


def _from_keys(said: GGUFHParams) -> HParams:
    return HParams(
        architecture=CHECKPOINT_ARCHITECTURES[0],
        vocab_size=said.vocab_size,
        hidden_size=said.hidden_size,
        intermediate_size=said.intermediate_size,
        head_dim=said.key_length,
        n_layer=said.n_layer,
        n_mtp=said.n_mtp,
        n_expert=said.n_expert,
        n_expert_used=said.n_expert_used,
        expert_size=said.expert_size,
        shared_expert_size=said.shared_expert_size,
        router_scale=said.router_scale,
        router_norm=said.router_norm,
        sliding_window=said.sliding_window,
        rms_norm_eps=said.rms_norm_eps,
        max_position=said.max_position,
        rope_scaling=None,
        bos_token_id=said.bos_token_id,
        eos_token_ids=said.eos_token_ids,
        layers=_read_layers(said),
    )


def _read_layers(said: GGUFHParams) -> tuple[Layer, ...]:
    heads, kv_heads, sliding = said.heads, said.kv_heads, said.sliding_layers
    clamps, clamps_shared = said.clamps, said.clamps_shared
    full, windowed = (said.key_length // 2, said.rope_theta_full), (said.key_length, said.rope_theta_sliding)
    layers = []
    for i in range(said.n_layer + said.n_mtp):
        n_rot, theta = windowed if sliding[i] else full
        layers.append(
            Layer(
                index=i,
                is_mtp=i >= said.n_layer,
                is_sliding=sliding[i],
                is_moe=said.n_dense <= i < said.n_layer,
                n_head=heads[i],
                n_head_kv=kv_heads[i],
                n_rot=n_rot,
                rope_theta=theta,
                clamp=clamps[i],
                clamp_shared=clamps_shared[i],
            )
        )
    return tuple(layers)


def _check_tensors(source: TensorSource, hp: HParams) -> None:
    for spec in tensor_specs(hp):
        tensor = source.tensors.get(spec.name)
        if tensor is None:
            raise BadMetadata(f"{source.path}: the tensor {spec.name} is missing", hint=_WHOLE)
        if tensor.shape != spec.shape:
            found, expected = list(tensor.shape), list(spec.shape)
            raise BadMetadata(
                f"{source.path}: the tensor {spec.name} is {found}, and the keys say {expected}",
                hint="Convert the model again.",
            )
