"""Checkpoints made up for tests: the published layout and every mechanism of it, in any size."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from stepgguf.demo import CHECKPOINT
from stepgguf.demo.train import quantize_fp8
from stepgguf.model.hparams import HParams
from stepgguf.model.tensors import TensorSpec, tensor_specs


@dataclass(frozen=True)
class Shape:
    """Sizes of a generated model. layer 0, 4, 8 ... are full attention; the first n_dense layers have no experts."""

    n_layer: int = 5
    n_dense: int = 2
    n_mtp: int = 0
    n_expert: int = 6
    n_used: int = 2
    hidden: int = 256
    dense: int = 512
    expert: int = 256
    head_dim: int = 64
    heads: tuple[int, int] = (8, 12)  # full, sliding
    kv_heads: int = 2
    vocab: int = 768
    window: int = 32
    original_context: int = 2048
    context: int = 4096


def config(shape: Shape, *, cut_lists: bool = False) -> dict[str, Any]:
    """A config.json in the flat 3.5 spelling."""
    n = shape.n_layer + (0 if cut_lists else shape.n_mtp)
    sliding = [i >= shape.n_layer or i % 4 != 0 for i in range(n)]
    last = shape.n_layer - 1
    return {
        "architectures": ["Step3p5ForCausalLM"],
        "model_type": "step3p5",
        "rope_scaling": {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 32.0,
                         "original_max_position_embeddings": shape.original_context},
        "yarn_only_types": ["full_attention"],
        "hidden_size": shape.hidden,
        "intermediate_size": shape.dense,
        "num_hidden_layers": shape.n_layer,
        "vocab_size": shape.vocab,
        "torch_dtype": "bfloat16",
        "use_qk_norm": True,
        "moe_layers_enum": ",".join(map(str, range(shape.n_dense, shape.n_layer))),
        "num_attention_heads": shape.heads[0],
        "num_attention_groups": shape.kv_heads,
        "head_dim": shape.head_dim,
        "use_moe": True,
        "moe_num_experts": shape.n_expert,
        "moe_top_k": shape.n_used,
        "moe_intermediate_size": shape.expert,
        "share_expert_dim": shape.expert,
        "moe_layer_offset": 0,
        "moe_every_n_layer": 1,
        "norm_expert_weight": True,
        "moe_router_activation": "sigmoid",
        "moe_router_scaling_factor": 3.0,
        "att_impl_type": "GQA",
        "tie_word_embeddings": False,
        "rope_theta": [10000.0 if s else 5000000.0 for s in sliding],
        "use_head_wise_attn_gate": True,
        "sliding_window": shape.window,
        "use_moe_router_bias": True,
        "need_fp32_gate": True,
        "sink": False,
        "layer_types": ["sliding_attention" if s else "full_attention" for s in sliding],
        "use_rope_layers": [],
        "num_nextn_predict_layers": shape.n_mtp,
        "partial_rotary_factors": [1.0 if s else 0.5 for s in sliding],
        "eos_token_id": [1, 2, shape.vocab - 7],
        "bos_token_id": 0,
        "attention_other_setting": {"attention_type": "sliding_attention", "num_attention_heads": shape.heads[1],
                                    "num_attention_groups": shape.kv_heads, "head_dim": shape.head_dim},
        "swiglu_limits": [0.5 if last - 1 <= i <= last else 0.0 for i in range(n)],
        "swiglu_limits_shared": [0.6 if i == last else 0.0 for i in range(n)],
        "zero_centered": True,
        "max_position_embeddings": shape.context,
    }  # fmt: skip


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    """The same in the 3.7 spelling, which leaves keys out."""
    left_out = ("use_qk_norm", "zero_centered", "tie_word_embeddings", "architectures", "model_type", "torch_dtype")
    return {
        "architectures": ["Step3p7ForConditionalGeneration"],
        "model_type": "step3p7",
        "text_config": {key: value for key, value in flat.items() if key not in left_out} | {"use_mfa": False},
    }


def values(spec: TensorSpec, rng: torch.Generator) -> Tensor:
    """Random values of the size that training gives them; norms near zero, because they are stored minus one."""
    if len(spec.shape) == 1:
        return torch.randn(spec.shape, generator=rng) * 0.1
    # More of a spread between rows than a plain normal has: scale searches must have something to do.
    rows = torch.rand(*spec.shape[:-1], 1, generator=rng) + 0.5
    return torch.randn(spec.shape, generator=rng) * rows / math.sqrt(spec.shape[-1])


def write_checkpoint(
    path: Path,
    shape: Shape = Shape(),
    *,
    fp8: bool = False,
    spelling: str = "3.5",
    seed: int = 0,
    cut_lists: bool = False,
    index: bool = False,
) -> Path:
    """Write a checkpoint in two shards. `index`: with an index that, for FP8, is as stale as the official one."""
    path.mkdir(parents=True, exist_ok=True)
    flat = config(shape, cut_lists=cut_lists)
    (path / "config.json").write_text(json.dumps(nested(flat) if spelling == "3.7" else flat, indent=1))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (path / name).write_text((CHECKPOINT / name).read_text())
    rng = torch.Generator().manual_seed(seed)
    shards: list[dict[str, Tensor]] = [{}, {}]
    listed = {}
    for i, spec in enumerate(tensor_specs(HParams.from_config(flat))):
        shard, tensor = shards[i % 2], values(spec, rng)
        if fp8 and spec.role.endswith("_exps"):
            shard[spec.source], shard[f"{spec.source}_scale_inv"] = quantize_fp8(tensor)
        else:
            shard[spec.source] = tensor if spec.role == "exp_probs_b" else tensor.bfloat16()
        listed[spec.source] = f"model-{i % 2 + 1:05d}.safetensors"
    for i, shard in enumerate(shards):
        save_file(shard, path / f"model-{i + 1:05d}.safetensors", metadata={"format": "pt"} if fp8 else None)
    if index:
        document = {"metadata": {"total_size": 0}, "weight_map": listed}
        (path / "model.safetensors.index.json").write_text(json.dumps(document))
    return path
