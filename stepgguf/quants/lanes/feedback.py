"""Codes by error feedback: each column's rounding error is carried into the columns after it.

With second moments H = R R^T, R upper triangular, the error of a row (w - q) H (w - q)^T is the sum over columns j of

    R[j,j]^2 * (t[j] - q[j])^2        t[j] = w[j] + sum over k < j of (w[k] - q[k]) * R[k,j] / R[j,j]

so the code of column j is the one nearest to t[j] (LDLQ; GPTQ is the same written with the inverse of H). What columns
of earlier blocks add to t is a matrix product outside; this kernel goes through the columns of one block.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from stepgguf.quants.lanes.blocks import inverse_or_zero
from stepgguf.quants.lanes.compile import kernel
from stepgguf.quants.lanes.part_tiles import GROUP, Rules, add_products, nearest_code, read_numbers, value_of
from stepgguf.quants.lanes.tile import fill_row_starts, read_bytes, read_tile, write_tile
from stepgguf.quants.lanes.vector import LANES, byte_tile, f32_tile, floats, load, load_bytes, store, store_bytes, where

Floats = NDArray[np.float32]


@kernel
def feed_back(
    targets: Floats,
    weights: Floats,
    first: int,
    factor: Floats,
    steps: Floats,
    minimums: Floats,
    rules: Rules,
    codes: NDArray[np.uint8],
    errors: Floats,
) -> None:
    """Choose the codes of n columns, from column `first` on of weights [rows, columns].

    targets     [rows, n]: the weights and what earlier columns add
    factor      [n, n]: R[k,j] / R[j,j] of these columns
    steps       [rows, n / sub]: what a code's value is multiplied with; minimums, likewise: what is subtracted then
    codes       [rows, columns], in and out: where the step is 0 a code stays
    errors      [rows, columns], out: weights - decoded
    """
    rows, columns = weights.shape
    n = targets.shape[1]
    subs = n // rules.sub
    t, w, e, a, b = f32_tile(n), f32_tile(n), f32_tile(n), f32_tile(subs), f32_tile(subs)
    levels, starts = byte_tile(n), np.empty(LANES, np.int64)
    flat_targets, flat_weights, flat_codes, flat_errors = (
        targets.reshape(-1),
        weights.reshape(-1),
        codes.reshape(-1),
        errors.reshape(-1),
    )
    for row in range(0, rows, LANES):
        fill_row_starts(rows, row, n, 0, starts)
        read_tile(flat_targets, starts, None, t, n)
        fill_row_starts(rows, row, columns, first, starts)
        read_tile(flat_weights, starts, None, w, n)
        read_bytes(flat_codes, starts, levels, n)
        read_numbers(steps, row, 0, subs, a)
        read_numbers(minimums, row, 0, subs, b)
        for group in range(0, n, GROUP):
            add_products(e, 0, group, factor, group, t, group)
            step, minimum = load(a, group // rules.sub), load(b, group // rules.sub)
            inverse = inverse_or_zero(step)
            for j in range(group, group + GROUP):
                code = nearest_code((load(t, j) + minimum) * inverse, rules)
                code = where(step == floats(0.0), load_bytes(levels, j), code)
                store_bytes(levels, j, code)
                error = load(w, j) - (step * value_of(code, rules) - minimum)
                store(e, j, error)
                for k in range(j + 1, group + GROUP):
                    store(t, k, load(t, k) + error * floats(factor[j, k]))
        write_tile(levels, flat_codes, starts, n)
        write_tile(e, flat_errors, starts, n)
