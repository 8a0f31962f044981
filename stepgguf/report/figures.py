"""The numbers of a report, computed once for the page and for --json. Plain data: dicts, lists, numbers, None.

A token reads every dense byte, n_used / n_expert of the routed ones, one row of the embeddings and, without drafting,
nothing of the MTP blocks.

Use is an expert's calibration tokens over the mean of its layer, so 1 is an even share. A mean over experts is weighted
by use, since that is how often a token meets the error. Where an imatrix does not count, the importance mass over its
mean (how strongly an expert is driven) is shown in its place and weighs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from stepgguf.convert.fold import ranges
from stepgguf.report.measured import ATTENTION, DENSE, EMBEDDINGS, GROUPS, MTP, ROUTED, SHARED, Floats, Measured, Tensor

PROJECTIONS = {"gate": "ffn_gate_exps", "up": "ffn_up_exps", "down": "ffn_down_exps"}
N_WORST = 20
_FLOATS = ("F32", "F16", "BF16", "F64")


@dataclass(frozen=True, slots=True)
class Experts:
    """The routed experts. tensors[projection][layer]; count (tokens) and mass float64 [layers, n_expert] if known."""

    n_expert: int
    layers: list[int]
    tensors: dict[str, dict[int, Tensor]]
    count: Floats | None
    mass: Floats | None

    @property
    def use(self) -> Floats | None:
        """The count, else the mass, over the mean of the layer; 0 where a layer saw nothing."""
        seen = self.mass if self.count is None else self.count
        if seen is None:
            return None
        mean, share = weighted_mean(seen, np.ones_like(seen))[:, None], np.zeros_like(seen)
        np.divide(seen, mean, out=share, where=mean > 0)
        return share

    def of(self, projection: str, kind: str) -> Floats:
        """One kind of figure, float64 [layers, n_expert]; NaN where it was not measured."""
        ledgers = [self.tensors[projection][layer].ledger for layer in self.layers]
        unknown = np.full(self.n_expert, np.nan)
        return np.array([unknown if ledger is None else getattr(ledger, kind) for ledger in ledgers])

    def means(self, projection: str) -> Floats:
        """The mean error of each layer, float64 [layers]."""
        error = self.of(projection, "error")
        return weighted_mean(error, np.ones_like(error) if self.count is None else self.count)


def summary(measured: Measured) -> dict[str, Any]:
    """The headline, sizes, means by layer, worst and unseen experts, and what is missing."""
    experts = routed(measured)
    tensors = measured.tensors
    n_bytes, n_values = sum(t.info.n_bytes for t in tensors), sum(t.info.n_values for t in tensors)
    return {
        "name": measured.name,
        "files": [path.name for path in measured.paths],
        "made_by": measured.made_by,
        "type": measured.type,
        "source": measured.source,
        "recipe": measured.recipe,
        "imatrix": asdict(measured.imatrix) if measured.imatrix else None,
        "tensors": len(tensors),
        "values": n_values,
        "bytes": n_bytes,
        "bpw": n_bytes * 8 / max(1, n_values),
        "read_per_token": sum(_read(t, measured) for t in tensors),
        "groups": _groups(measured),
        "errors": _errors(measured, experts),
        "worst": worst(experts) if experts else [],
        "coverage": _coverage(experts) if experts else None,
        "missing": list(_missing(measured, experts)),
    }


def maps(measured: Measured) -> dict[str, Any]:
    """The type map and, where it was measured, the heat map: every tensor and every expert."""
    experts = routed(measured)
    return {
        "n_layer": measured.n_layer,
        "bits": {t.info.ggml_type.name: t.bits for t in measured.tensors},
        "floats": _FLOATS,
        "types": [
            [t.layer, t.role, t.info.ggml_type.name, t.info.n_bytes, _mean_error(t)]
            for t in measured.tensors
            if len(t.info.shape) > 1
        ],
        "experts": _heat(experts) if experts else None,
    }


def routed(measured: Measured) -> Experts | None:
    """The routed experts, if the file has any that were measured."""
    whole = [t for t in measured.tensors if t.group == ROUTED and t.info.shape[0] == measured.n_expert]
    tensors = {
        projection: {t.layer: t for t in whole if t.role == role and t.layer is not None}
        for projection, role in PROJECTIONS.items()
    }
    layers = sorted(set.intersection(*(set(by_layer) for by_layer in tensors.values())))
    if not any(tensors[projection][layer].ledger for projection in tensors for layer in layers):
        return None
    experts = Experts(measured.n_expert, layers, tensors, None, None)
    gates = [tensors["gate"][layer].ledger for layer in layers]  # all three projections see the same tokens
    counted = all(ledger and ledger.count is not None for ledger in gates)
    weighed = all(ledger and ledger.mass is not None for ledger in gates)
    return replace(
        experts,
        count=experts.of("gate", "count") if counted else None,
        mass=experts.of("gate", "mass") if weighed else None,
    )


def weighted_mean(values: Floats, weights: Floats) -> Floats:
    """Over the last axis, of what is a number; NaN where nothing is, or nothing weighs."""
    known = np.where(np.isnan(values), 0.0, weights)
    total = known.sum(axis=-1)
    mean: Floats = np.full(total.shape, np.nan)
    np.divide((np.nan_to_num(values) * known).sum(axis=-1), total, out=mean, where=total > 0)
    return mean


def worst(experts: Experts, n: int = N_WORST) -> list[dict[str, Any]]:
    """The n experts with the highest error, of all projections; `ratio` is to the mean of their tensor."""
    rows = []
    for projection in PROJECTIONS:
        error, means = experts.of(projection, "error"), experts.means(projection)
        for i, e in np.argwhere(~np.isnan(error)):
            rows.append((error[i, e], -i, -e, projection, means[i]))
    rows.sort(reverse=True)
    return [_expert(experts, -i, -e, projection, mean) for _, i, e, projection, mean in rows[:n]]


def _expert(experts: Experts, i: int, e: int, projection: str, mean: float) -> dict[str, Any]:
    tensor = experts.tensors[projection][experts.layers[i]]
    assert tensor.ledger is not None
    return {
        "layer": experts.layers[i],
        "expert": int(e),
        "projection": projection,
        "type": tensor.info.ggml_type.name,
        "error": float(tensor.ledger.error[e]),
        "ratio": number(tensor.ledger.error[e] / mean if mean > 0 else np.nan),
        "use": None if experts.use is None else number(experts.use[i, e]),
        "count": None if experts.count is None else number(experts.count[i, e]),
    }


def _read(tensor: Tensor, measured: Measured) -> int:
    """Bytes of it that one token reads, on average."""
    n = tensor.info.n_bytes
    if tensor.group == ROUTED:
        return round(n * measured.n_used / max(1, measured.n_expert))
    if tensor.group == EMBEDDINGS:
        return n // tensor.info.shape[0]
    return 0 if tensor.group == MTP else n


def _groups(measured: Measured) -> list[dict[str, Any]]:
    members = {group: [t for t in measured.tensors if t.group == group] for group in GROUPS}
    return [
        {
            "group": group,
            "tensors": len(tensors),
            "values": sum(t.info.n_values for t in tensors),
            "bytes": sum(t.info.n_bytes for t in tensors),
            "read_per_token": sum(_read(t, measured) for t in tensors),
        }
        for group, tensors in members.items()
        if tensors
    ]


def _errors(measured: Measured, experts: Experts | None) -> list[dict[str, Any]]:
    """The mean error of the experts' projections and of the dense groups: over all layers, and by layer."""
    lines: list[dict[str, Any]] = []
    if experts:
        for projection in PROJECTIONS:
            means = experts.means(projection)
            lines.append(_line(f"experts: {projection}", dict(zip(experts.layers, means, strict=True))))
    for group in (SHARED, ATTENTION, DENSE):
        measured_here = [t for t in measured.tensors if t.group == group and t.layer is not None and t.ledger]
        layers = sorted({t.layer for t in measured_here if t.layer is not None})
        lines.append(_line(group, {i: _over_values([t for t in measured_here if t.layer == i]) for i in layers}))
    return [line for line in lines if line["mean"] is not None]


def _line(name: str, by_layer: dict[int, float]) -> dict[str, Any]:
    known = [value for value in by_layer.values() if not np.isnan(value)]
    return {
        "name": name,
        "mean": float(np.mean(known)) if known else None,
        "by_layer": {layer: number(value) for layer, value in by_layer.items()},
    }


def _over_values(tensors: list[Tensor]) -> float:
    """The mean error of dense tensors, each by its number of weights."""
    pairs = [(t.ledger.error[0], float(t.info.n_values)) for t in tensors if t.ledger]
    errors, n_values = np.array(pairs).T
    return float(weighted_mean(errors, n_values))


def _mean_error(tensor: Tensor) -> float | None:
    """Of the type map: experts unweighted, as the tensor is."""
    if tensor.ledger is None or np.isnan(tensor.ledger.error).all():
        return None
    return number(np.nanmean(tensor.ledger.error))


def _coverage(experts: Experts) -> dict[str, Any] | None:
    """How much of the calibration the experts saw."""
    if experts.count is None:
        return None
    unseen = {layer: np.flatnonzero(row == 0) for layer, row in zip(experts.layers, experts.count, strict=True)}
    return {
        "experts": experts.count.size,
        "unseen": {layer: ranges(which.tolist()) for layer, which in unseen.items() if which.size},
        "n_unseen": sum(which.size for which in unseen.values()),
        "median": number(np.nanmedian(experts.count)),
        "p5": number(np.nanpercentile(experts.count, 5)),
    }


def _missing(measured: Measured, experts: Experts | None) -> Iterable[str]:
    """What the page cannot show, why, and how to get it."""
    quantized = [t for t in measured.tensors if t.info.ggml_type.name not in _FLOATS]
    bare = [t for t in quantized if t.ledger is None]
    if not quantized:
        yield "Errors are not shown: no tensor is quantized. `stepgguf quantize` measures them as it takes bits away."
    elif len(bare) == len(quantized):
        yield ("Errors are not shown: the manifest has no ledger. Make the file again with `stepgguf convert` or "
               "`stepgguf quantize`, which measure while they quantize.")  # fmt: skip
    elif bare:
        yield f"{len(bare)} of {len(quantized)} quantized tensors have no error: they were copied as they were."
    if experts and measured.imatrix is None:
        yield ("Use is not known, and the error counts every weight alike: no importance matrix was given. "
               "`--imatrix FILE` gives both.")  # fmt: skip


def _heat(experts: Experts) -> dict[str, Any]:
    return {
        "layers": experts.layers,
        "types": {p: [experts.tensors[p][layer].info.ggml_type.name for layer in experts.layers] for p in PROJECTIONS},
        "error": {p: _numbers(experts.of(p, "error")) for p in PROJECTIONS},
        "rmse": {p: _numbers(experts.of(p, "rmse")) for p in PROJECTIONS},
        "use": None if experts.use is None else _numbers(experts.use),
        "count": None if experts.count is None else _numbers(experts.count),
    }


def _numbers(values: Floats) -> list[list[float | None]]:
    """For drawing: 5 digits are more than a pixel or a read-out shows, and keep the page small."""
    return [[None if value != value else float(f"{value:.5g}") for value in row] for row in values.tolist()]


def number(value: float | np.floating[Any]) -> float | None:
    """JSON has no NaN."""
    return None if np.isnan(value) else float(value)
