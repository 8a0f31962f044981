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

import math
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import numpy as np

from stepgguf.convert.fold import format_ranges
from stepgguf.report.experts import (
    PROJECTIONS,
    STANDS_OUT,
    RoutedExperts,
    find_outstanding,
    json_number,
    routed_experts,
    weighted_mean,
)
from stepgguf.report.measured import (
    ATTENTION,
    DENSE,
    EMBEDDINGS,
    GROUPS,
    MTP,
    ROUTED,
    SHARED,
    Floats,
    MeasuredFile,
    MeasuredTensor,
)

N_WORST = 20  # experts that are listed, of those that stand out
_FLOATS = ("F32", "F16", "BF16", "F64")


def summary(measured: MeasuredFile) -> dict[str, Any]:
    """The headline, sizes, means by layer, experts that stand out or were never seen, and what is missing."""
    experts, by_type = routed_experts(measured), type_levels(measured)
    standing_out = find_outstanding(experts) if experts else []
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
        "read_per_token": sum(_bytes_per_token(t, measured) for t in tensors),
        "groups": _group_sizes(measured),
        "levels": by_type,
        "errors": _error_lines(measured, experts, by_type),
        "stands_out": STANDS_OUT,
        "n_worst": len(standing_out),
        "worst": standing_out[:N_WORST],
        "coverage": _calibration_coverage(experts) if experts else None,
        "missing": list(_explain_missing(measured, experts)),
    }


def tensor_maps(measured: MeasuredFile) -> dict[str, Any]:
    """The type map and, where it was measured, the heat map: every tensor and every expert."""
    experts = routed_experts(measured)
    return {
        "n_layer": measured.n_layer,
        "bits": {t.type_name: t.bits for t in measured.tensors},
        "floats": _FLOATS,
        "types": [
            [t.layer, t.role, t.type_name, t.info.n_bytes, _mean_error(t)]
            for t in measured.tensors
            if len(t.info.shape) > 1
        ],
        "experts": _heat_map(experts) if experts else None,
    }


def type_levels(measured: MeasuredFile) -> dict[str, float]:
    """The level of every type that was measured: the median error of all that has it."""
    errors: dict[str, list[Floats]] = {}
    for t in measured.tensors:
        if t.ledger is not None:
            errors.setdefault(t.type_name, []).append(t.ledger.error[~np.isnan(t.ledger.error)])
    known = {name: np.concatenate(parts) for name, parts in errors.items()}
    return {name: float(np.median(values)) for name, values in known.items() if values.size and np.median(values) > 0}


def _bytes_per_token(tensor: MeasuredTensor, measured: MeasuredFile) -> int:
    """Bytes of a tensor that one token reads, on average."""
    n = tensor.info.n_bytes
    if tensor.group == ROUTED:
        return round(n * measured.n_used / max(1, measured.n_expert))
    if tensor.group == EMBEDDINGS:
        return n // tensor.info.shape[0]  # one row
    return 0 if tensor.group == MTP else n


def _group_sizes(measured: MeasuredFile) -> list[dict[str, Any]]:
    """The size of each group that the file has, and what a token reads of it."""
    members = {group: [t for t in measured.tensors if t.group == group] for group in GROUPS}
    return [
        {
            "group": group,
            "tensors": len(tensors),
            "values": sum(t.info.n_values for t in tensors),
            "bytes": sum(t.info.n_bytes for t in tensors),
            "read_per_token": sum(_bytes_per_token(t, measured) for t in tensors),
        }
        for group, tensors in members.items()
        if tensors
    ]


def _error_lines(
    measured: MeasuredFile, experts: RoutedExperts | None, by_type: dict[str, float]
) -> list[dict[str, Any]]:
    """The mean errors of the experts' projections and of the dense groups, a line of the diagram for each."""
    lines: list[dict[str, Any]] = []
    if experts:
        for projection in PROJECTIONS:
            means = experts.mean_errors(projection)
            relative = means / experts.type_levels(projection, by_type)
            lines.append(_error_line(f"experts: {projection}", experts.layers, means, relative))
    for group in (SHARED, ATTENTION, DENSE):
        here = [t for t in measured.tensors if t.group == group and t.layer is not None and t.ledger]
        layers = sorted({t.layer for t in here if t.layer is not None})
        pairs = [_mean_over_values([t for t in here if t.layer == layer], by_type) for layer in layers]
        lines.append(_error_line(group, layers, *np.array(pairs).reshape(-1, 2).T))
    return [line for line in lines if line["mean"] is not None]


def _error_line(name: str, layers: list[int], means: Floats, relative: Floats) -> dict[str, Any]:
    """A line's mean over all layers, its mean in each layer, and that over the level of the layer's type."""
    known = means[~np.isnan(means)]
    return {
        "name": name,
        "mean": float(known.mean()) if known.size else None,
        "by_layer": {layer: json_number(value) for layer, value in zip(layers, means, strict=True)},
        "relative": {layer: json_number(value) for layer, value in zip(layers, relative, strict=True)},
    }


def _mean_over_values(tensors: list[MeasuredTensor], by_type: dict[str, float]) -> tuple[float, float]:
    """The mean error of dense tensors, each by its number of weights: as it is, and over the level of its type."""
    errors = np.array([t.ledger.error[0] for t in tensors if t.ledger])
    levels = np.array([by_type.get(t.type_name, np.nan) for t in tensors if t.ledger])
    n_values = np.array([float(t.info.n_values) for t in tensors if t.ledger])
    return float(weighted_mean(errors, n_values)), float(weighted_mean(errors / levels, n_values))


def _mean_error(tensor: MeasuredTensor) -> float | None:
    """A tensor's error for the type map. Its experts count alike, since the map shows what lies in the file."""
    if tensor.ledger is None or np.isnan(tensor.ledger.error).all():
        return None
    return json_number(np.nanmean(tensor.ledger.error))


def _calibration_coverage(experts: RoutedExperts) -> dict[str, Any] | None:
    """How much of the calibration the experts saw. None if their tokens were not counted."""
    if experts.count is None:
        return None
    unseen = {layer: np.flatnonzero(row == 0) for layer, row in zip(experts.layers, experts.count, strict=True)}
    return {
        "experts": experts.count.size,
        "unseen": {layer: format_ranges(which.tolist()) for layer, which in unseen.items() if which.size},
        "n_unseen": sum(which.size for which in unseen.values()),
        "median": json_number(np.nanmedian(experts.count)),
        "p5": json_number(np.nanpercentile(experts.count, 5)),
    }


def _explain_missing(measured: MeasuredFile, experts: RoutedExperts | None) -> Iterable[str]:
    """What the page cannot show, why, and how to get it."""
    quantized = [t for t in measured.tensors if t.type_name not in _FLOATS]
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


def _heat_map(experts: RoutedExperts) -> dict[str, Any]:
    """Everything that the heat map can show of an expert, as matrices [layers, n_expert]."""
    return {
        "layers": experts.layers,
        "types": {p: [experts.tensors[p][layer].type_name for layer in experts.layers] for p in PROJECTIONS},
        "error": {p: _matrix_to_draw(experts.figure(p, "error")) for p in PROJECTIONS},
        "rmse": {p: _matrix_to_draw(experts.figure(p, "rmse")) for p in PROJECTIONS},
        "use": None if experts.relative_use is None else _matrix_to_draw(experts.relative_use),
        "count": None if experts.count is None else _matrix_to_draw(experts.count),
    }


def _matrix_to_draw(values: Floats) -> list[list[float | None]]:
    """The matrix with 5 digits, which are more than a pixel or a read-out shows and keep the page small."""
    return [[None if math.isnan(value) else float(f"{value:.5g}") for value in row] for row in values.tolist()]
