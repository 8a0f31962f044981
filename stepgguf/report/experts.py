"""The routed experts of a file: their errors and use as matrices [layers, n_expert], and which of them stand out.

An expert stands out whose error is far above the median of its own tensor. It is compared in logarithms, where the
errors of one tensor's experts vary about alike on both sides of their median.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from stepgguf.report.measured import ROUTED, Floats, MeasuredFile, MeasuredTensor

PROJECTIONS = {"gate": "ffn_gate_exps", "up": "ffn_up_exps", "down": "ffn_down_exps"}
# An expert stands out whose error is so many standard deviations above the median of its tensor, in logarithms (the
# deviation is 1.4826 times the median absolute one), and so many times the median. Of the 36,288 of the real model, if
# they vary as a normal distribution does, one passes in a hundred files.
STANDS_OUT = {"sigmas": 5.0, "times": 1.5}


@dataclass(frozen=True, slots=True)
class RoutedExperts:
    """The routed experts of a file.

    tensors: by projection, then by layer; every projection has all of `layers`.
    count, mass: calibration tokens and importance mass, float64 [layers, n_expert]; None where they are not known.
    """

    n_expert: int
    layers: list[int]
    tensors: dict[str, dict[int, MeasuredTensor]]
    count: Floats | None
    mass: Floats | None

    @property
    def relative_use(self) -> Floats | None:
        """The count, else the mass, over its mean in the layer, [layers, n_expert]; 0 where a layer saw nothing."""
        seen = self.mass if self.count is None else self.count
        if seen is None:
            return None
        # A layer that saw no token has a mean of 0, and its experts have none of it.
        mean, share = weighted_mean(seen, np.ones_like(seen))[:, None], np.zeros_like(seen)
        np.divide(seen, mean, out=share, where=mean > 0)
        return share

    def figure(self, projection: str, name: str) -> Floats:
        """A figure of the ledgers by its name, float64 [layers, n_expert]; NaN where it was not measured."""
        ledgers = [self.tensors[projection][layer].ledger for layer in self.layers]
        unknown = np.full(self.n_expert, np.nan)
        return np.array([unknown if ledger is None else getattr(ledger, name) for ledger in ledgers])

    def type_levels(self, projection: str, by_type: dict[str, float]) -> Floats:
        """The level of the type that each layer has, float64 [layers]; NaN where a type was not measured."""
        types = [self.tensors[projection][layer].type_name for layer in self.layers]
        return np.array([by_type.get(name, np.nan) for name in types])

    def mean_errors(self, projection: str) -> Floats:
        """The mean error of each layer, float64 [layers]: as tokens meet it where they were counted."""
        error = self.figure(projection, "error")
        return weighted_mean(error, np.ones_like(error) if self.count is None else self.count)


def routed_experts(measured: MeasuredFile) -> RoutedExperts | None:
    """The routed experts of the layers that have all three projections; None if none of them was measured."""
    whole = [t for t in measured.tensors if t.group == ROUTED and t.info.shape[0] == measured.n_expert]
    tensors = {
        projection: {t.layer: t for t in whole if t.role == role and t.layer is not None}
        for projection, role in PROJECTIONS.items()
    }
    layers = sorted(set.intersection(*(set(by_layer) for by_layer in tensors.values())))
    if not any(tensors[projection][layer].ledger for projection in tensors for layer in layers):
        return None
    experts = RoutedExperts(measured.n_expert, layers, tensors, None, None)
    gates = [tensors["gate"][layer].ledger for layer in layers]  # all three projections see the same tokens
    counted = all(ledger and ledger.count is not None for ledger in gates)
    weighed = all(ledger and ledger.mass is not None for ledger in gates)
    return replace(
        experts,
        count=experts.figure("gate", "count") if counted else None,
        mass=experts.figure("gate", "mass") if weighed else None,
    )


def find_outstanding(experts: RoutedExperts) -> list[dict[str, Any]]:
    """The experts that stand out, as JSON. The first is the highest above the median of its tensor."""
    found = []  # ratio, layer, expert, projection; negated, so that equal ratios are in the order of the file
    for projection in PROJECTIONS:
        for i, error in enumerate(experts.figure(projection, "error")):
            # An expert of zeros loses nothing, and 0 has no logarithm.
            median, least = outstanding_bound(error[error > 0])
            found += [(error[e] / median, -i, -e, projection) for e in np.flatnonzero(error > least)]
    found.sort(reverse=True)
    return [_describe_expert(experts, -i, -int(e), projection, ratio) for ratio, i, e, projection in found]


def outstanding_bound(errors: Floats) -> tuple[float, float]:
    """The median of a tensor's errors, and the error above which an expert stands out. NaN of no errors."""
    if not errors.size:
        return np.nan, np.nan
    logs = np.log(errors)
    median = np.median(logs)
    sigma = 1.4826 * np.median(np.abs(logs - median))
    above = max(STANDS_OUT["sigmas"] * sigma, np.log(STANDS_OUT["times"]))
    return float(np.exp(median)), float(np.exp(median + above))


def _describe_expert(experts: RoutedExperts, i: int, e: int, projection: str, ratio: float) -> dict[str, Any]:
    tensor = experts.tensors[projection][experts.layers[i]]
    assert tensor.ledger is not None
    return {
        "layer": experts.layers[i],
        "expert": e,
        "projection": projection,
        "type": tensor.type_name,
        "error": float(tensor.ledger.error[e]),
        "ratio": float(ratio),
        "use": None if experts.relative_use is None else json_number(experts.relative_use[i, e]),
        "count": None if experts.count is None else json_number(experts.count[i, e]),
    }


def weighted_mean(values: Floats, weights: Floats) -> Floats:
    """The mean over the last axis of the values that are numbers; NaN where none is, or none weighs anything."""
    known = np.where(np.isnan(values), 0.0, weights)
    total = known.sum(axis=-1)
    mean: Floats = np.full(total.shape, np.nan)
    np.divide((np.nan_to_num(values) * known).sum(axis=-1), total, out=mean, where=total > 0)
    return mean


def json_number(value: float | np.floating[Any]) -> float | None:
    """The value as JSON has it: null for NaN."""
    return None if np.isnan(value) else float(value)
