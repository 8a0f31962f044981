"""The numbers of a report, computed once for the page and for --json. Plain data: dicts, lists, numbers, None.

A token reads every dense byte, n_used / n_expert of the routed ones, one row of the embeddings and, without drafting,
nothing of the MTP blocks.

A type's level is the median error of all that was measured in it: each expert of each projection, each dense tensor.
An error over the level of its type shows where a type does worse than elsewhere in the file, which the error itself
hides among the steps from type to type.

Use is an expert's calibration tokens over the mean of its layer, so 1 is an even share. A mean over experts is weighted
by use, since that is how often a token meets the error. Where an imatrix does not count, the importance mass over its
mean (how strongly an expert is driven) is shown in its place and weighs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from stepgguf.convert.fold import format_ranges
from stepgguf.report.measured import ATTENTION, DENSE, EMBEDDINGS, GROUPS, MTP, ROUTED, SHARED, Floats, Measured, Tensor

PROJECTIONS = {"gate": "ffn_gate_exps", "up": "ffn_up_exps", "down": "ffn_down_exps"}
N_WORST = 20
# An expert stands out whose error is so many standard deviations above the median of its tensor, in logarithms (the
# deviation is 1.4826 times the median absolute one), and so many times the median. Of the 36,288 of the real model, if
# they vary as a normal distribution does, one passes in a hundred files.
STANDS_OUT = {"sigmas": 5.0, "times": 1.5}
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

    def levels(self, projection: str, levels: dict[str, float]) -> Floats:
        """That of each layer's type, float64 [layers]; NaN where a type was not measured."""
        types = [self.tensors[projection][layer].info.ggml_type.name for layer in self.layers]
        return np.array([levels.get(name, np.nan) for name in types])

    def means(self, projection: str) -> Floats:
        """The mean error of each layer, float64 [layers]."""
        error = self.of(projection, "error")
        return weighted_mean(error, np.ones_like(error) if self.count is None else self.count)


def summary(measured: Measured) -> dict[str, Any]:
    """The headline, sizes, means by layer, experts that stand out or were never seen, and what is missing."""
    experts, by_type = routed(measured), levels(measured)
    standing_out = outstanding(experts) if experts else []
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
        "levels": by_type,
        "errors": _errors(measured, experts, by_type),
        "stands_out": STANDS_OUT,
        "n_worst": len(standing_out),
        "worst": standing_out[:N_WORST],
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


def levels(measured: Measured) -> dict[str, float]:
    """Of every type that was measured."""
    errors: dict[str, list[Floats]] = {}
    for t in measured.tensors:
        if t.ledger is not None:
            errors.setdefault(t.info.ggml_type.name, []).append(t.ledger.error[~np.isnan(t.ledger.error)])
    known = {name: np.concatenate(parts) for name, parts in errors.items()}
    return {name: float(np.median(values)) for name, values in known.items() if values.size and np.median(values) > 0}


def outstanding(experts: Experts) -> list[dict[str, Any]]:
    """The experts that stand out, of all projections; the first is the highest above the median of its tensor."""
    found = []
    for projection in PROJECTIONS:
        for i, error in enumerate(experts.of(projection, "error")):
            median, least = _bound(error[error > 0])
            found += [(error[e] / median, -i, -e, projection) for e in np.flatnonzero(error > least)]
    found.sort(reverse=True)
    return [_expert(experts, -i, -int(e), projection, ratio) for ratio, i, e, projection in found]


def _bound(errors: Floats) -> tuple[float, float]:
    """The median of a tensor's errors, and what an expert that stands out is above."""
    if not errors.size:
        return np.nan, np.nan
    logs = np.log(errors)
    median = np.median(logs)
    sigma = 1.4826 * np.median(np.abs(logs - median))
    above = max(STANDS_OUT["sigmas"] * sigma, np.log(STANDS_OUT["times"]))
    return float(np.exp(median)), float(np.exp(median + above))


def _expert(experts: Experts, i: int, e: int, projection: str, ratio: float) -> dict[str, Any]:
    tensor = experts.tensors[projection][experts.layers[i]]
    assert tensor.ledger is not None
    return {
        "layer": experts.layers[i],
        "expert": e,
        "projection": projection,
        "type": tensor.info.ggml_type.name,
        "error": float(tensor.ledger.error[e]),
        "ratio": float(ratio),
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


def _errors(measured: Measured, experts: Experts | None, by_type: dict[str, float]) -> list[dict[str, Any]]:
    """The mean error of the experts' projections and of the dense groups: over all layers, by layer, and by layer over
    the level of the type."""
    lines: list[dict[str, Any]] = []
    if experts:
        for projection in PROJECTIONS:
            means = experts.means(projection)
            relative = means / experts.levels(projection, by_type)
            lines.append(_line(f"experts: {projection}", experts.layers, means, relative))
    for group in (SHARED, ATTENTION, DENSE):
        here = [t for t in measured.tensors if t.group == group and t.layer is not None and t.ledger]
        layers = sorted({t.layer for t in here if t.layer is not None})
        pairs = [_over_values([t for t in here if t.layer == layer], by_type) for layer in layers]
        lines.append(_line(group, layers, *np.array(pairs).reshape(-1, 2).T))
    return [line for line in lines if line["mean"] is not None]


def _line(name: str, layers: list[int], means: Floats, relative: Floats) -> dict[str, Any]:
    known = means[~np.isnan(means)]
    return {
        "name": name,
        "mean": float(known.mean()) if known.size else None,
        "by_layer": {layer: number(value) for layer, value in zip(layers, means, strict=True)},
        "relative": {layer: number(value) for layer, value in zip(layers, relative, strict=True)},
    }


def _over_values(tensors: list[Tensor], by_type: dict[str, float]) -> tuple[float, float]:
    """The mean error of dense tensors, each by its number of weights: as it is, and over the level of its type."""
    errors = np.array([t.ledger.error[0] for t in tensors if t.ledger])
    levels = np.array([by_type.get(t.info.ggml_type.name, np.nan) for t in tensors if t.ledger])
    n_values = np.array([float(t.info.n_values) for t in tensors if t.ledger])
    return float(weighted_mean(errors, n_values)), float(weighted_mean(errors / levels, n_values))


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
        "unseen": {layer: format_ranges(which.tolist()) for layer, which in unseen.items() if which.size},
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
    elif measured.without_manifest and len(bare) == len(quantized):
        yield ("Errors are not shown: there is no manifest beside the file. `stepgguf convert` and `stepgguf quantize` "
               "measure while they quantize and write one.")  # fmt: skip
    elif measured.without_manifest:
        names = ", ".join(path.name for path in measured.without_manifest)
        yield f"The errors of some tensors are not shown: there is no manifest beside {names}."
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
