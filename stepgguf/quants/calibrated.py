"""Blocks of ggml's formats whose codes are chosen against second moments: the same bytes in size, less output error.

    for each step of 256 columns:   scales as ggml chooses them, for the weights that make up for the steps before
                                    codes by error feedback, then descent over codes, scales and minimums   (twice)
    for each sweep, each step:      descent in the full metric
    for each row:                   the start (ggml's own blocks) stays where it is no worse

Between steps, everything is a matrix product; in a step, kernels of lanes/ (feedback.py, descent.py) take over. Every
call holds the GIL briefly at most and shares nothing, so threads can quantize matrices side by side; BLAS should then
have one thread.

The metric of a step, when the steps before are done and those behind will make up for it, is S = R R^T of the step's
own part of R (second_moments.py): error = sum over steps of |(e + f R^-1) R|^2, e the step's errors, f what the steps
before add. Hence the weights to aim at, w + f R^-1, and the residual, (f + e R) R^T.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from gguf import GGMLQuantizationType

from stepgguf.errors import QuantError
from stepgguf.quants.kernels import Blocks, choose_kernel, decoder_for
from stepgguf.quants.lanes.descent import descend
from stepgguf.quants.lanes.feedback import feed_back
from stepgguf.quants.lanes.part_tiles import Rules
from stepgguf.quants.parts import TABLE, Layout, Parts, empty_parts, pack, take_apart
from stepgguf.quants.second_moments import Floats, SecondMoments, row_errors, steps
from stepgguf.quants.types import quant_type, row_size

ROUNDS = 2  # of feedback and descent in a step
ROUND_PASSES = 3  # of descent in a round
SWEEP_PASSES = 2
ROWS = 2048  # rows that are worked on together, so that memory is bounded


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows as their blocks come to be: parts and errors change in place."""

    ggml_type: GGMLQuantizationType
    rules: Rules
    target: Floats  # [rows, columns]
    moments: SecondMoments
    parts: Parts
    errors: Floats  # [rows, columns]: target - decoded values


def encode_calibrated(
    ggml_type: GGMLQuantizationType,
    weights: Floats,
    moments: SecondMoments,
    importance: Floats | None = None,
    *,
    target: Floats | None = None,
    sweeps: int = 2,
) -> Blocks:
    """Encode weights [rows, columns] as blocks [rows, row bytes] that lose little of the outputs on such inputs.

    importance  [columns]: what ggml's encoder weighs columns with, at the start and in choosing scales; without it,
                the mean squares that the moments have
    target      [rows, columns]: what the decoded values should be instead of the weights (shifted_target)

    No row's error (target - q) H (target - q)^T is higher than that of ggml's blocks of its weights. QuantError if the
    type has no scalar codes, the weights are not finite or too large for it.
    """
    if ggml_type not in TABLE:
        raise QuantError(
            f"codes of {quant_type(ggml_type).name} cannot be chosen against second moments",
            hint=f"That is done for {', '.join(known.name for known in TABLE)}.",
        )
    target = weights if target is None else target
    importance = moments.matrix.diagonal().copy() if importance is None else importance
    out = np.empty((len(weights), row_size(ggml_type, weights.shape[1])), np.uint8)
    for rows in (slice(start, start + ROWS) for start in range(0, len(weights), ROWS)):
        out[rows] = _encode_rows(ggml_type, weights[rows], target[rows], moments, importance, sweeps)
    return out


def _encode_rows(
    ggml_type: GGMLQuantizationType,
    weights: Floats,
    target: Floats,
    moments: SecondMoments,
    importance: Floats,
    sweeps: int,
) -> Blocks:
    start = _stock(ggml_type, weights, importance)
    rows = _new_rows(ggml_type, target, moments)
    _feed_back(rows, importance)
    for _ in range(sweeps):
        _sweep(rows)
    decoded = np.empty_like(target)
    decoder_for(ggml_type).decode(start, decoded)
    is_better = row_errors(rows.errors, moments.matrix) < row_errors(target - decoded, moments.matrix)
    return np.where(is_better[:, None], pack(ggml_type, rows.parts), start)


def _new_rows(ggml_type: GGMLQuantizationType, target: Floats, moments: SecondMoments) -> _Rows:
    layout = TABLE[ggml_type]
    target = np.ascontiguousarray(target)
    parts = empty_parts(layout, *target.shape)
    return _Rows(ggml_type, _rules(layout), target, moments, parts, np.empty_like(target))


def _rules(layout: Layout) -> Rules:
    scales, minimums = layout.scales, layout.minimums
    return Rules(
        layout.block,
        layout.sub,
        layout.codes.lowest,
        layout.codes.highest,
        layout.codes.zero,
        layout.uneven,
        scales is not None,
        0 if scales is None else scales.lowest - scales.zero,
        0 if scales is None else scales.highest - scales.zero,
        layout.minimum_factor is not None,
        0 if minimums is None else minimums.highest,
    )


def _stock(ggml_type: GGMLQuantizationType, weights: Floats, importance: Floats) -> Blocks:
    """ggml's blocks."""
    out = np.empty((len(weights), row_size(ggml_type, weights.shape[1])), np.uint8)
    if not choose_kernel(ggml_type, weighted=True).encode(np.ascontiguousarray(weights), out, importance):
        raise QuantError("the weights have values that are not finite")
    return out


def _feed_back(rows: _Rows, importance: Floats) -> None:
    """All parts, step by step; each step makes up for the errors of those before."""
    for first, n in steps(rows.target.shape[1]):
        step = slice(first, first + n)
        own, errors = rows.target[:, step], rows.errors[:, step]
        root = rows.moments.root[step, step]
        carried = rows.errors[:, :first] @ rows.moments.root[:first, step]
        _choose_scales(rows, own + carried @ np.linalg.inv(root), importance[step], first)
        pivots, metric = root.diagonal(), root @ root.T
        aims, factor = own + carried / pivots, root / pivots
        for _ in range(ROUNDS):
            feed_back(rows.target, aims, factor, *rows.parts, rows.rules, first, rows.errors)
            residuals = (carried + errors @ root) @ root.T
            descend(rows.target, residuals, metric, *rows.parts, rows.rules, first, ROUND_PASSES, rows.errors)


def _choose_scales(rows: _Rows, target: Floats, importance: Floats, first: int) -> None:
    """The parts of the step from column `first` on as ggml chooses them for the target [rows, columns of the step]."""
    chosen = take_apart(rows.ggml_type, _stock(rows.ggml_type, target, importance))
    part = rows.parts.columns(TABLE[rows.ggml_type], first, target.shape[1])
    part.fill(chosen)


def _sweep(rows: _Rows) -> None:
    """Descent through all steps once, each with all other columns as they are."""
    moments = rows.moments
    for first, n in steps(rows.target.shape[1]):
        residuals = rows.errors @ moments.matrix[:, first : first + n]
        residuals += np.float32(moments.damping) * rows.errors[:, first : first + n]
        block = moments.damped_block(first, n)
        descend(rows.target, residuals, block, *rows.parts, rows.rules, first, SWEEP_PASSES, rows.errors)
