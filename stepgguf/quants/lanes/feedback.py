"""Codes by error feedback: each column's rounding error is carried into the columns after it.

With second moments H = R R^T, R upper triangular, the error (w - q) H (w - q)^T of a row is the sum over columns j of

    R[j,j]^2 * (t[j] - q[j])^2        t[j] = w[j] + sum over k < j of (w[k] - q[k]) * R[k,j] / R[j,j]

so the code of column j is the one whose value is nearest to t[j] (LDLQ; GPTQ is the same written with the inverse of
H). What the columns before the step add to t is a matrix product outside; this kernel goes through those of a step.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from stepgguf.quants.lanes.blocks import inverse_or_zero
from stepgguf.quants.lanes.compile import inlined, kernel
from stepgguf.quants.lanes.operands import F32Tile
from stepgguf.quants.lanes.part_tiles import (
    GROUP,
    Floats,
    PartTiles,
    Rules,
    add_products,
    nearest_code,
    part_tiles,
    read_parts,
    step_of,
    value_at,
)
from stepgguf.quants.lanes.tile import fill_row_starts, read_bytes, read_tile, write_tile
from stepgguf.quants.lanes.vector import LANES, f32_tile, floats, load, load_bytes, store, store_bytes, where


@inlined
def _choose_codes(
    group: int, factor: Floats, parts: PartTiles, rules: Rules, t: F32Tile, w: F32Tile, e: F32Tile
) -> None:
    """The codes of GROUP columns from `group` on, and their errors e."""
    step, lowered = step_of(parts, group // rules.sub, rules)
    inverse = inverse_or_zero(step)
    for j in range(group, group + GROUP):
        code = nearest_code((load(t, j) + lowered) * inverse, rules)
        store_bytes(parts.codes, j, where(step == floats(0.0), load_bytes(parts.codes, j), code))
        error = load(w, j) - (step * value_at(parts, j, rules) - lowered)
        store(e, j, error)
        for k in range(j + 1, group + GROUP):
            store(t, k, load(t, k) + error * floats(factor[j, k]))


@kernel
def feed_back(
    weights: Floats,
    targets: Floats,
    factor: Floats,
    factors: Floats,
    minimum_factors: Floats,
    scales: Floats,
    minimums: Floats,
    codes: NDArray[np.uint8],
    rules: Rules,
    first: int,
    errors: Floats,
) -> None:
    """Choose the codes of a step of n columns from column `first` on, for scales and minimums as they are.

    weights     [rows, columns]
    targets     [rows, n]: the weights of the step and what earlier columns add to them
    factor      [n, n]: R[k,j] / R[j,j] of the step's columns
    factors     and so on: the parts of rows [rows, columns] (quants/parts); where a scale is 0, codes stay
    errors      [rows, columns], out: weights - decoded values
    """
    rows, columns = weights.shape
    n = targets.shape[1]
    t, w, e, parts, starts = f32_tile(n), f32_tile(n), f32_tile(n), part_tiles(rules, n), np.empty(LANES, np.int64)
    flat_targets, flat_weights = targets.reshape(-1), weights.reshape(-1)
    flat_codes, flat_errors = codes.reshape(-1), errors.reshape(-1)
    for row in range(0, rows, LANES):
        fill_row_starts(rows, row, n, 0, starts)
        read_tile(flat_targets, starts, None, t, n)
        fill_row_starts(rows, row, columns, first, starts)
        read_tile(flat_weights, starts, None, w, n)
        read_bytes(flat_codes, starts, parts.codes, n)
        read_parts(factors, minimum_factors, scales, minimums, row, first, rules, parts)
        for group in range(0, n, GROUP):
            add_products(e, 0, group, factor, group, t)
            _choose_codes(group, factor, parts, rules, t, w, e)
        write_tile(parts.codes, flat_codes, starts, n)
        write_tile(e, flat_errors, starts, n)
