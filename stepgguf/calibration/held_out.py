"""Tokens that are held out of the moments, so that codes can be tried on what they were not chosen for."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from stepgguf.reference.token_rows import TokenRows

HELD_OUT = 8  # one token in so many
Mask = NDArray[np.bool_]


def held_out_tokens(rows: TokenRows) -> Mask:
    """Which tokens are held out, [n, t]: every HELD_OUT-th row; of fewer rows, the last part of each one's text."""
    if rows.n_rows >= HELD_OUT:
        held = (np.arange(rows.n_rows) % HELD_OUT == HELD_OUT - 1)[:, None]
    else:
        lengths = rows.text.sum(1, keepdims=True)
        held = rows.text.cumsum(1) > lengths - lengths // HELD_OUT
    result: Mask = rows.text & held
    return result


def thinned(mask: Mask, most: int) -> Mask:
    """At most so many of the places of a mask [n], evenly picked."""
    places = np.flatnonzero(mask)
    result = np.zeros_like(mask)
    result[places[:: max(1, -(-len(places) // most))]] = True
    return result
