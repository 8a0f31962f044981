"""What is measured of each prediction, one float32 each: all that is kept of a row of logits.

    nll       -ln q of the token that came              nll_base   -ln p of it, by the reference
    kld       sum over i of p_i (ln p_i - ln q_i)       delta_p    q - p of the token that came
    same_top  both have the same most likely token

p is the reference's distribution, q that of the file that is evaluated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from stepgguf.evaluation.softmax import Floats, exp, log_sum_exp

Tokens = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False, slots=True)
class Scores:
    """The scores of n predictions, [n] each."""

    nll: Floats
    nll_base: Floats
    kld: Floats
    delta_p: Floats
    same_top: npt.NDArray[np.bool_]

    @classmethod
    def joined(cls, parts: Sequence[Scores]) -> Scores:
        """Put the scores of several parts behind each other."""
        return cls(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)))


@dataclass(frozen=True, eq=False, slots=True)
class Student:
    """The distributions of the evaluated file for n predictions.

    logits: [n, n_vocab]. norm: ln q_i = logit_i - norm, [n]. nll: [n]. top: the most likely tokens, [n].
    """

    logits: Floats
    norm: Floats
    nll: Floats
    top: npt.NDArray[np.intp]

    @classmethod
    def of(cls, logits: Floats, targets: Tokens) -> Student:
        """Normalize logits [n, n_vocab]; targets [n] are the tokens that came."""
        largest, log_sum = log_sum_exp(logits)
        norm = largest + log_sum
        return cls(logits, norm, norm - at(logits, targets), logits.argmax(axis=-1))

    def scores(self, nll_base: Floats, kld: npt.NDArray[np.float64], top: npt.NDArray[np.integer]) -> Scores:
        """Return all scores, given the reference's nll [n] and most likely tokens [n], and the divergence [n]."""
        delta_p = exp(-self.nll) - exp(-nll_base)
        return Scores(self.nll, nll_base, kld.astype(np.float32), delta_p, self.top == top)


def at(values: Floats, tokens: Tokens) -> Floats:
    """Return each row's value of its token: values [n, n_vocab], tokens [n]."""
    return values[np.arange(len(tokens)), tokens]
