"""Blocks of ggml's formats chosen against second moments: the same bytes in size, less output error.

    for each step of 256 columns:   begin: blocks that make up for the errors of the steps before
    for each sweep, each step:      improve: all other columns as they are
    for each row:                   ggml's own blocks stay where these are no better

Between steps, everything is a matrix product (block LDLQ; then a descent by blocks); what is done in a step is in
step_encoder.py and code_encoder.py. Nothing is shared and the GIL is held for moments only, so threads can encode
matrices side by side; BLAS should then have one thread. Bytes depend on how BLAS rounds: on its build, its threads,
the processor and the number of rows.
"""

from __future__ import annotations

import numpy as np
from gguf import GGMLQuantizationType

from stepgguf.errors import QuantError
from stepgguf.quants.code_encoder import CodeEncoder
from stepgguf.quants.kernels import Blocks
from stepgguf.quants.parts import TABLE
from stepgguf.quants.second_moments import Floats, SecondMoments, row_errors, steps
from stepgguf.quants.step_encoder import BlockEncoder, StepEncoder, decode, encode_as_ggml
from stepgguf.quants.types import FLOATS, quant_type, row_size

ROWS = 2048  # rows that are worked on together, so that memory is bounded


def encode_calibrated(
    ggml_type: GGMLQuantizationType,
    weights: Floats,
    moments: SecondMoments,
    importance: Floats | None = None,
    *,
    target: Floats | None = None,
    stock: Blocks | None = None,
    sweeps: int = 2,
) -> Blocks:
    """Encode weights [rows, columns] as blocks [rows, row bytes] that lose little of the outputs on such inputs.

    importance  [columns]: what ggml's encoder weighs columns with, at the start and in choosing scales; without it,
                the damped diagonal of the moments
    target      [rows, columns]: what the decoded values should be instead of the weights (calibration/moments.py)
    stock       [rows, row bytes]: ggml's blocks of the weights, where they are known

    No row's error (target - q) H (target - q)^T is higher than that of ggml's blocks of its weights. QuantError if the
    type has no blocks, or the weights are not finite or too large for it.
    """
    if ggml_type in FLOATS:
        raise QuantError(f"{quant_type(ggml_type).name} has no blocks to choose against second moments")
    target = weights if target is None else target
    importance = moments.matrix.diagonal() + np.float32(moments.damping) if importance is None else importance
    out = np.empty((len(weights), row_size(ggml_type, weights.shape[1])), np.uint8)
    for rows in (slice(start, start + ROWS) for start in range(0, len(weights), ROWS)):
        encoder = new_encoder(ggml_type, target[rows], moments, importance)
        begin_steps(encoder)
        for _ in range(sweeps):
            improve_steps(encoder)
        start = encode_as_ggml(ggml_type, weights[rows], importance) if stock is None else stock[rows]
        out[rows] = _better_rows(encoder, start)
    return out


def new_encoder(
    ggml_type: GGMLQuantizationType, target: Floats, moments: SecondMoments, importance: Floats
) -> StepEncoder:
    """What chooses the type's blocks."""
    encoder = CodeEncoder if ggml_type in TABLE else BlockEncoder
    return encoder(ggml_type, target, moments, importance)


def begin_steps(encoder: StepEncoder) -> None:
    """All blocks, step by step."""
    for step in steps(encoder.target.shape[1]):
        encoder.begin(step, encoder.errors[:, : step.start] @ encoder.moments.root[: step.start, step])


def improve_steps(encoder: StepEncoder) -> None:
    """One sweep."""
    for step in steps(encoder.target.shape[1]):
        residuals = encoder.errors @ encoder.moments.matrix[:, step]
        residuals += np.float32(encoder.moments.damping) * encoder.errors[:, step]
        encoder.improve(step, residuals)


def _better_rows(encoder: StepEncoder, start: Blocks) -> Blocks:
    """Of each row the encoder's blocks if their error is lower, else those of the start."""
    matrix, target = encoder.moments.matrix, encoder.target
    errors = target - decode(encoder.ggml_type, start, target.shape[1])
    is_better = row_errors(encoder.errors, matrix) < row_errors(errors, matrix)
    return np.where(is_better[:, None], encoder.blocks(), start)
