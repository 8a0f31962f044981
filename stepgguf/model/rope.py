"""rope_freqs.weight: the one tensor of a GGUF that no checkpoint has. It follows from config.json."""

from __future__ import annotations

import math

import numpy as np

from stepgguf.model.hparams import HParams
from stepgguf.model.names import TensorName

ROPE_FREQS = TensorName("rope_freqs.weight")


def rope_freqs(hp: HParams) -> bytes | None:
    """What llama3 scaling divides each frequency of full-attention layers by, float32 [head_dim / 2].

    Only the first n_rot / 2 count; the rest are 1. None without scaling. Formula: reference/model.py.
    """
    if hp.rope_scaling is None:
        return None
    s, n_rot = hp.rope_scaling, hp.head_dim // 2
    exponents = np.arange(0, n_rot, 2, dtype=np.float32) / np.float32(n_rot)
    turns = s.original_max_position / (2 * math.pi) / np.power(np.float32(hp.rope_theta_full), exponents).astype(float)
    smooth = np.clip((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor), 0.0, 1.0)
    factors = np.ones(hp.head_dim // 2, np.float32)
    factors[: n_rot // 2] = 1.0 / ((1.0 - smooth) / s.factor + smooth)
    return factors.tobytes()
