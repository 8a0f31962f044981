"""The small form of a reference: the K most likely tokens of each prediction, and ONE bin for all the rest.

A row, little endian:

    id int32 [K] | ln p float32 [K] | ln p of the rest | ln p of the token that came | id of the most likely token

The evaluated file is put into the same K + 1 bins, and binned is compared with binned:

    kld = sum over k of p_k (ln p_k - ln q_k) + p_rest (ln p_rest - ln q_rest)

which is 0 for an identical file, never more than the divergence over all tokens (merging outcomes cannot add
information: the log sum inequality), never less with a larger K, and equal to it for K = n_vocab. Perplexity, delta p
and the same top do not depend on K.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from stepgguf.evaluation.coded_rows import Records
from stepgguf.evaluation.scores import Scores, Student, Tokens, at
from stepgguf.evaluation.softmax import Floats, log_sum_exp


class TopRows:
    """Rows of the top_k most likely of n_vocab tokens."""

    def __init__(self, n_vocab: int, top_k: int) -> None:
        self.n_vocab, self.top_k = n_vocab, min(top_k, n_vocab)
        self.dtype = np.dtype(
            [
                ("ids", "<i4", (self.top_k,)),
                ("log_probs", "<f4", (self.top_k,)),
                ("rest", "<f4"),
                ("target", "<f4"),
                ("top", "<i4"),
            ]
        )

    def encode(self, logits: Floats, targets: Tokens) -> Records:
        """Return the rows [n] of logits [n, n_vocab]; targets [n] are the tokens that came."""
        largest, log_sum = log_sum_exp(logits)
        norm = largest + log_sum
        rows = np.zeros(len(logits), self.dtype)
        rows["ids"] = np.argpartition(logits, -self.top_k, axis=-1)[:, -self.top_k :]
        rows["log_probs"], rows["rest"] = _bins(logits, norm, rows["ids"])
        rows["target"] = at(logits, targets) - norm
        rows["top"] = logits.argmax(axis=-1)
        return rows

    def compare(self, rows: Records, logits: Floats, targets: Tokens) -> Scores:
        """Score logits [n, n_vocab] of the evaluated file against rows [n]; targets [n] are the tokens that came."""
        student = Student.of(logits, targets)
        log_q, rest_q = _bins(logits, student.norm, rows["ids"])
        kld = _divergence(rows["log_probs"], log_q).sum(axis=-1) + _divergence(rows["rest"], rest_q)
        return student.scores(-rows["target"], kld, rows["top"])


def _bins(logits: Floats, norm: Floats, ids: npt.NDArray[np.int32]) -> tuple[Floats, Floats]:
    """Return ln p of the tokens with these ids, [n, K], and of all others together, [n].

    The others are summed: 1 minus the rest would lose their digits where they are unlikely.
    """
    log_probs = np.take_along_axis(logits, ids, axis=-1) - norm[:, None]
    others = np.exp(logits.astype(np.float64) - norm[:, None])
    np.put_along_axis(others, ids, 0.0, axis=-1)
    total = others.sum(axis=-1)
    rest = np.log(total, out=np.full_like(total, -np.inf), where=total > 0)  # K = n_vocab leaves none
    return log_probs, rest.astype(np.float32)


def _divergence(log_p: Floats, log_q: Floats) -> npt.NDArray[np.float64]:
    """p (ln p - ln q), and 0 where p is 0."""
    wide_p, wide_q = log_p.astype(np.float64), log_q.astype(np.float64)
    possible = np.isfinite(wide_p)
    difference = np.subtract(wide_p, wide_q, out=np.zeros_like(wide_p), where=possible)
    return np.exp(wide_p) * difference
