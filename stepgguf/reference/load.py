"""Loading a checkpoint into the reference model, in float32. For checkpoints that fit in memory."""

from __future__ import annotations

import numpy as np
import torch

from stepgguf.convert.sources.checkpoint import Checkpoint
from stepgguf.convert.sources.source import rows_per_expert
from stepgguf.quants.values import widen
from stepgguf.reference.model import Step35


def load_reference(checkpoint: Checkpoint) -> Step35:
    """The reference model with a checkpoint's values; those stored as FP8 are scaled."""
    state = {}
    for name, tensor in checkpoint.tensors.items():
        values = np.empty(tensor.shape, np.float32)
        rows = values.reshape(-1, tensor.shape[-1])
        per_expert = rows_per_expert(tensor.shape)
        for start in range(0, len(rows), per_expert):
            widen(checkpoint.values(name, start, start + per_expert), rows[start : start + per_expert])
        state[name] = torch.from_numpy(values)
    return Step35.from_state(checkpoint.hparams, state)
