"""Second moments that tests quantize against, and errors in float64."""

from __future__ import annotations

from typing import Any

import numpy as np


def correlated(columns: int, seed: int = 0) -> Any:
    """Moments of inputs that a quarter as many hidden numbers and some noise make; columns differ in size."""
    rng = np.random.default_rng(seed)
    hidden = rng.standard_normal((4 * columns, columns // 4)) / np.sqrt(np.arange(1, columns // 4 + 1))
    inputs = hidden @ rng.standard_normal((columns // 4, columns))
    inputs += 0.3 * inputs.std() * rng.standard_normal(inputs.shape)
    inputs *= np.exp(0.5 * rng.standard_normal(columns))
    return (inputs.T @ inputs / len(inputs)).astype(np.float32)


def diagonal(columns: int) -> Any:
    """Independent inputs of different sizes."""
    return np.diag(np.random.default_rng(1).gamma(0.5, 1.0, columns)).astype(np.float32)


def rank_one(columns: int) -> Any:
    """One input, again and again."""
    one = np.random.default_rng(2).standard_normal(columns)
    return np.outer(one, one).astype(np.float32)


def with_dead_columns(columns: int) -> Any:
    """Correlated inputs, every third of which is always 0."""
    moments = correlated(columns)
    moments[::3] = 0
    moments[:, ::3] = 0
    return moments


def zero(columns: int) -> Any:
    return np.zeros((columns, columns), np.float32)


def error(difference: Any, moments: Any) -> Any:
    """e H e^T of each row, in float64."""
    difference = difference.astype(np.float64)
    return np.einsum("ij,ij->i", difference @ moments.astype(np.float64), difference)
