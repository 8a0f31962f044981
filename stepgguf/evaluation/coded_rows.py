"""llama-perplexity's form of a reference: all log-probabilities, as 16-bit codes.

A row, little endian, in uint16 (numbers of the vocabulary n, rounded up to an even one):

    scale f32 | min_log_prob f32 | code 0 ... code n - 1 [| unused]        ln p_i = scale * code_i + min_log_prob

Codes are steps of scale between the largest logit and the smallest, or 16 below the largest if that is higher: what is
less likely is held at the floor. So codes are off by up to 1.2e-4, and a model differs from itself by that.

The divergence leaves out tokens with ln p of -16 or less, and p is not normalized again (tools/perplexity,
perplexity.cpp, log_softmax).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from stepgguf.evaluation.scores import Scores, Student, Tokens, at
from stepgguf.evaluation.softmax import Floats, exp, log_sum_exp

Records = npt.NDArray[Any]

DEPTH = np.float32(16.0)  # nats below the largest logit that codes reach; tokens with ln p <= -DEPTH do not count
_STEPS = np.float32(65535.0)


class CodedRows:
    """Rows of 16-bit codes for a vocabulary of n_vocab tokens."""

    top_k = 0

    def __init__(self, n_vocab: int) -> None:
        self.n_vocab = n_vocab
        self.dtype = np.dtype([("scale", "<f4"), ("min_log_prob", "<f4"), ("codes", "<u2", (n_vocab + n_vocab % 2,))])

    def encode(self, logits: Floats, targets: Tokens) -> Records:
        """Return the rows [n] of logits [n, n_vocab], byte for byte as llama-perplexity writes them."""
        largest, log_sum = log_sum_exp(logits)
        floor = np.maximum(logits.min(axis=-1), largest - DEPTH)
        rows = np.zeros(len(logits), self.dtype)
        rows["min_log_prob"] = floor - largest - log_sum
        rows["scale"] = scale = (largest - floor) / _STEPS
        steps = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)
        codes = np.rint(steps[:, None] * np.maximum(logits - floor[:, None], np.float32(0)))
        rows["codes"][:, : self.n_vocab] = codes.astype(np.uint16)
        return rows

    def compare(self, rows: Records, logits: Floats, targets: Tokens) -> Scores:
        """Score logits [n, n_vocab] of the evaluated file against rows [n]; targets [n] are the tokens that came."""
        student = Student.of(logits, targets)
        codes = rows["codes"][:, : self.n_vocab].astype(np.float32)
        log_p = rows["scale"][:, None] * codes + rows["min_log_prob"][:, None]
        terms = exp(log_p) * (log_p - logits + student.norm[:, None])
        kld = terms.sum(axis=-1, dtype=np.float64, where=log_p > -DEPTH)
        return student.scores(-at(log_p, targets), kld, log_p.argmax(axis=-1))
