"""The expert ledger: what quantizing cost, tensor by tensor and expert by expert. It stands in the manifest.

    error   sum w (x - q)^2 / sum w x^2 over an expert's weights; w: the importance of the column, 1 without; null
            where nothing is driven
    rmse    sqrt(mean (x - q)^2)
    mass    sum of the expert's importance row: how strongly its input is driven
    count   calibration tokens that the expert saw

One number per expert, a list of one for a dense tensor; mass and count are there with an importance matrix only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from stepgguf.convert.importance import Importance
from stepgguf.convert.plan import PlannedTensor, Unit
from stepgguf.quants.kernels import Loss

_DIGITS = 5  # significant


def ledger_field(
    tensor: PlannedTensor, units: Sequence[tuple[Unit, Loss | None]], importance: Importance | None
) -> dict[str, Any]:
    """{"ledger": ...}, one tensor's member of the manifest, from its units' losses; {} if it was not quantized."""
    losses = [Loss(0.0, 0.0, 0.0)] * tensor.n_experts
    for unit, loss in units:
        if loss is None:
            return {}
        expert = unit.start // tensor.rows_per_expert
        losses[expert] = losses[expert] + loss
    n_values = tensor.n_values // tensor.n_experts
    result: dict[str, list[Any]] = {
        "error": [_round(loss.weighted / loss.energy) if loss.energy else None for loss in losses],
        "rmse": [_round(math.sqrt(loss.squared / n_values)) for loss in losses],
    }
    rows = None if importance is None else importance.rows(tensor.name, tensor.shape)
    if importance is not None and rows is not None:
        result["mass"] = [_round(float(mass)) for mass in rows.sum(axis=1)]
        counts = importance.counts(tensor.name, tensor.shape)
        if counts is not None:
            result["count"] = [int(count) for count in counts]
    return {"ledger": result}


def _round(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
