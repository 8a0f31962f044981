"""Names of stored tensors in the spelling of the published checkpoints, which the table (tensors.py) uses.

Programs that load and save a checkpoint leave their traces in its names: wrappers put a prefix or an infix before them,
transformers has names of its own for what it holds in memory. Each row of SPELLINGS undoes one; all are applied, in
order.
"""

from __future__ import annotations

import re

SPELLINGS = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^(?:_orig_mod\.|module\.|base_model\.model\.)+", ""),  # torch.compile, DataParallel and DeepSpeed, PEFT
        (r"(?<=\.)(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.", ""),
        (r"^(?:model\.language_model|language_model\.model)\.", "model."),  # StepFun's NVFP4, transformers' VLMs
        (r"^language_model\.lm_head\.", "lm_head."),
        (r"^(?=(?:layers|embed_tokens|norm)\.)", "model."),  # a text model saved without its head
        (r"\.mlp\.gate\.weight$", ".moe.gate.weight"),  # transformers' names in memory
        (r"\.mlp\.gate\.e_score_correction_bias$", ".moe.router_bias"),
        (r"\.mlp\.experts\.(gate_up_proj|down_proj)(_\w+)?$", r".moe.\1.weight\2"),
        (r"\.mlp\.experts\.(?=\d)", ".moe.experts."),
        (r"\.mlp\.shared_experts\.", ".share_expert."),
    )
)

# Step-3.7's vision tower, in the published spelling and in transformers'. Only the text part is converted.
VISION_PREFIXES = (
    "vision_model.", "vit_large_projector.", "model.vision_model.", "model.vit_large_projector.",
    "multi_modal_projector.", "model.multi_modal_projector.",
)  # fmt: skip

# What is no weight: buffers that old versions of transformers saved, which follow from config.json, and scales by which
# other programs quantize activations and their cache while they run.
NO_WEIGHT = (".rotary_emb.inv_freq", ".input_scale", ".activation_scale", ".k_scale", ".v_scale", ".kv_scale")


def published_name(name: str) -> str:
    """The name that the published checkpoints have for a stored tensor."""
    for pattern, replacement in SPELLINGS:
        name = pattern.sub(replacement, name)
    return name
