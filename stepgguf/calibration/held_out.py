"""Tokens that are held out of the moments, so that codes can be tried on what they were not chosen for.

Some of the text, and all guard tokens (guard.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stepgguf.calibration.moments import TokenSample
from stepgguf.reference.token_rows import TokenRows

HELD_OUT = 8  # one token in so many
Mask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False, slots=True)
class HeldOut:
    """What codes are tried on: some of the text, and guard tokens, which all weigh the same."""

    text: TokenSample
    guard: TokenSample

    @classmethod
    def of(cls, quantized: Tensor, exact: Tensor, weights: Tensor, text: Tensor, guard: Tensor) -> HeldOut:
        """Of tokens' x~ and x [n, columns] and what they weigh [n], those of two masks [n]."""
        return cls(
            TokenSample(quantized[text], exact[text], weights[text]),
            TokenSample(quantized[guard], exact[guard], torch.ones(int(guard.sum()), device=weights.device)),
        )

    @classmethod
    def joined(cls, parts: Sequence[HeldOut]) -> HeldOut:
        """All of them."""
        return cls(
            TokenSample.joined([part.text for part in parts]), TokenSample.joined([part.guard for part in parts])
        )


def held_out_tokens(rows: TokenRows) -> Mask:
    """Which of the text are held out, [n, t]: every HELD_OUT-th row; of fewer, the last part of each one's text."""
    if rows.n_rows >= HELD_OUT:
        held = (np.arange(rows.n_rows) % HELD_OUT == HELD_OUT - 1)[:, None]
    else:
        lengths = rows.text.sum(1, keepdims=True)
        held = rows.text.cumsum(1) > lengths - lengths // HELD_OUT
    result: Mask = rows.text & ~rows.guard & held
    return result


def thinned(mask: Mask, most: int) -> Mask:
    """At most so many of the places of a mask [n], evenly picked."""
    places = np.flatnonzero(mask)
    result = np.zeros_like(mask)
    result[places[:: max(1, -(-len(places) // most))]] = True
    return result
