"""The normalization of logits as llama-perplexity computes it, to the last bit.

    norm = max + ln(sum over i of exp(l_i - max))          ln p_i = l_i - norm

exp is that of float32 numbers and the sum is in float64. glibc's expf computes in float64 and rounds, so that is done
here too: numpy's own float32 exp is off by up to 2.5 units in the last place.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


def exp(x: Floats) -> Floats:
    """Return e^x, rounded to float32 once."""
    return np.exp(x.astype(np.float64)).astype(np.float32)


def log_sum_exp(logits: Floats) -> tuple[Floats, Floats]:
    """Return the largest logit of each row, and the logarithm of the sum of exp(logit - largest), [n] each."""
    largest = logits.max(axis=-1)
    total = exp(logits - largest[:, None]).sum(axis=-1, dtype=np.float64)
    return largest, np.log(total).astype(np.float32)
