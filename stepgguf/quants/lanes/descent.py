"""Descent of the error (w - q) H (w - q)^T, one number of a block at a time, in the columns of one block.

Along a direction v (what q gains by a step of 1 of a code, a scale, a minimum or a factor) the error is a parabola:

    error(q + t v) = error(q) - t * (2 v.r - t * v.H v)        r = (w - q) H, the residual

so the best t is v.r / v.H v, rounded to what the format can store, and it is taken if the error falls. r is exact for
the block when it begins (a matrix product outside) and is kept up to date for its columns alone.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from stepgguf.quants.lanes.blocks import inverse_or_zero
from stepgguf.quants.lanes.compile import inlined, kernel
from stepgguf.quants.lanes.operands import ByteTile, F32Lanes, F32Tile
from stepgguf.quants.lanes.part_tiles import (
    GROUP,
    Rules,
    add_products,
    nearest_code,
    read_numbers,
    value_of,
    write_numbers,
)
from stepgguf.quants.lanes.rounding import from_half, nearest_int, to_half
from stepgguf.quants.lanes.tile import fill_row_starts, read_bytes, read_tile, write_tile
from stepgguf.quants.lanes.vector import (
    LANES,
    byte_tile,
    f32_tile,
    floats,
    load,
    load_bytes,
    store,
    store_bytes,
    to_float,
    where,
)

Floats = NDArray[np.float32]


@inlined
def _whole(v: F32Lanes, low: int, high: int) -> F32Lanes:
    """The nearest whole number from low to high; low for NaN."""
    v = where(v > floats(low), v, floats(low))
    return to_float(nearest_int(where(v < floats(high), v, floats(high))))


@inlined
def _best_along(
    v: F32Tile, start: int, stop: int, moments: Floats, r: F32Tile, hv: F32Tile
) -> tuple[F32Lanes, F32Lanes]:
    """(v.r, v.H v) of the direction v in columns start to stop - 1; H v goes to hv."""
    along, curvature = floats(0.0), floats(0.0)
    for column in range(start, stop, GROUP):
        for i in range(column, column + GROUP):
            store(hv, i, floats(0.0))
        add_products(v, start, stop, moments, column, hv, column)
        for i in range(column, column + GROUP):
            along = along + load(v, i) * load(r, i)
            curvature = curvature + load(v, i) * load(hv, i)
    return along, curvature


@inlined
def _step(
    old: F32Lanes, new: F32Lanes, along: F32Lanes, curvature: F32Lanes, start: int, stop: int, hv: F32Tile, r: F32Tile
) -> tuple[F32Lanes, F32Lanes]:
    """(the number that is kept of old and new, by how much the error falls); r follows."""
    t = new - old
    gain = t * (along + along - t * curvature)
    is_better = gain > floats(0.0)
    t = where(is_better, t, floats(0.0))
    for i in range(start, stop):
        store(r, i, load(r, i) - t * load(hv, i))
    return where(is_better, new, old), where(is_better, gain, floats(0.0))


@inlined
def _decode(
    levels: ByteTile, start: int, stop: int, step: F32Lanes, minimum: F32Lanes, rules: Rules, q: F32Tile
) -> None:
    for i in range(start, stop):
        store(q, i, step * value_of(load_bytes(levels, i), rules) - minimum)


@kernel
def descend(
    weights: Floats,
    residuals: Floats,
    moments: Floats,
    factors: Floats,
    minimum_factors: Floats,
    scales: Floats,
    minimums: Floats,
    codes: NDArray[np.uint8],
    rules: Rules,
    first: int,
    passes: int,
    refit: int,
    errors: Floats,
    gains: Floats,
) -> None:
    """Improve the parts (quants/parts) of n columns of rows of blocks, from column `first` on, in place.

    weights     [rows, columns]
    residuals   [rows, n]: (weights - decoded) H of these columns
    moments     [n, n]: H of these columns; its diagonal is above 0
    passes      how often to go through the columns
    refit       1: also scales, minimums and factors of sub-blocks; 2: also factors of blocks of several sub-blocks
    errors      [rows, columns], out: weights - decoded
    gains       [rows]: what the error falls by is added
    """
    rows, columns = weights.shape
    n = residuals.shape[1]
    sub, block = rules.sub, rules.block
    subs, blocks, zero = n // sub, n // block, floats(0.0)
    w, g, r, v, hv = f32_tile(n), f32_tile(n), f32_tile(n), f32_tile(n), f32_tile(n)
    q, moved, levels, starts = f32_tile(n), f32_tile(n), byte_tile(n), np.empty(LANES, np.int64)
    d, dmin, scale, minimum = f32_tile(blocks), f32_tile(blocks), f32_tile(subs), f32_tile(subs)
    inverse_diagonal = np.empty(n, np.float32)
    for j in range(n):
        inverse_diagonal[j] = np.float32(1) / moments[j, j]
    flat_weights, flat_residuals = weights.reshape(-1), residuals.reshape(-1)
    flat_codes, flat_errors = codes.reshape(-1), errors.reshape(-1)
    for row in range(0, rows, LANES):
        fill_row_starts(rows, row, n, 0, starts)
        read_tile(flat_residuals, starts, None, g, n)
        fill_row_starts(rows, row, columns, first, starts)
        read_tile(flat_weights, starts, None, w, n)
        read_bytes(flat_codes, starts, levels, n)
        read_numbers(factors, row, first // block, blocks, d)
        read_numbers(minimum_factors, row, first // block, blocks, dmin)
        read_numbers(scales, row, first // sub, subs, scale)
        read_numbers(minimums, row, first // sub, subs, minimum)
        gained = zero
        if refit > 1 and rules.own_scales:
            for b in range(blocks):
                start, stop = b * block, (b + 1) * block
                for i in range(start, stop):
                    store(v, i, load(scale, i // sub) * value_of(load_bytes(levels, i), rules))
                along, curvature = _best_along(v, start, stop, moments, g, hv)
                old = load(d, b)
                new = from_half(to_half(old + along * inverse_or_zero(curvature)))
                new = where(old == zero, old, new)
                new, gain = _step(old, new, along, curvature, start, stop, hv, g)
                store(d, b, new)
                gained = gained + gain
                if rules.minimums > 0:
                    for i in range(start, stop):
                        store(v, i, zero - load(minimum, i // sub))
                    along, curvature = _best_along(v, start, stop, moments, g, hv)
                    old = load(dmin, b)
                    new = from_half(to_half(old + along * inverse_or_zero(curvature)))
                    new = where(old == zero, old, new)
                    new, gain = _step(old, new, along, curvature, start, stop, hv, g)
                    store(dmin, b, new)
                    gained = gained + gain
        for s in range(subs):
            b = s * sub // block
            _decode(levels, s * sub, (s + 1) * sub, load(d, b) * load(scale, s), load(dmin, b) * load(minimum, s), rules, q)
        for i in range(n):
            store(moved, i, zero)
        for turn in range(passes):
            for s in range(subs):
                start, stop = s * sub, (s + 1) * sub
                b = start // block
                for i in range(start, stop):
                    store(r, i, load(g, i))
                for column in range(start, stop, GROUP):
                    add_products(moved, 0, start if turn == 0 else n, moments, column, r, column)
                if refit > 0:
                    old_d, old_scale, old_dmin, old_minimum = load(d, b), load(scale, s), load(dmin, b), load(minimum, s)
                    for i in range(start, stop):
                        value = value_of(load_bytes(levels, i), rules)
                        store(v, i, old_d * value if rules.own_scales else value)
                    along, curvature = _best_along(v, start, stop, moments, r, hv)
                    t = along * inverse_or_zero(curvature)
                    if rules.own_scales:
                        new = _whole(old_scale + t, rules.scale_low, rules.scale_high)
                        new, gain = _step(old_scale, new, along, curvature, start, stop, hv, r)
                        store(scale, s, new)
                    else:
                        new = where(old_d == zero, old_d, from_half(to_half(old_d + t)))
                        new, gain = _step(old_d, new, along, curvature, start, stop, hv, r)
                        store(d, b, new)
                    gained = gained + gain
                    if rules.minimums > 0:
                        for i in range(start, stop):
                            store(v, i, zero - old_dmin if rules.own_scales else floats(-1.0))
                        along, curvature = _best_along(v, start, stop, moments, r, hv)
                        t = along * inverse_or_zero(curvature)
                        if rules.own_scales:
                            new = _whole(old_minimum + t, 0, rules.minimum_high)
                            new, gain = _step(old_minimum, new, along, curvature, start, stop, hv, r)
                            store(minimum, s, new)
                        else:
                            new = from_half(to_half(old_dmin + t))
                            new, gain = _step(old_dmin, new, along, curvature, start, stop, hv, r)
                            store(dmin, b, new)
                        gained = gained + gain
                step, lowered = load(d, b) * load(scale, s), load(dmin, b) * load(minimum, s)
                if refit > 0:
                    for i in range(start, stop):
                        now = step * value_of(load_bytes(levels, i), rules) - lowered
                        store(moved, i, load(moved, i) + (load(q, i) - now))
                        store(q, i, now)
                inverse = inverse_or_zero(step)
                for j in range(start, stop):
                    old, rest = load(q, j), load(r, j)
                    code = nearest_code((old + rest * floats(inverse_diagonal[j]) + lowered) * inverse, rules)
                    new = step * value_of(code, rules) - lowered
                    t = new - old
                    gain = t * (rest + rest - t * floats(moments[j, j]))
                    is_better = (gain > zero) & (step != zero)
                    t = where(is_better, t, zero)
                    gained = gained + where(is_better, gain, zero)
                    store_bytes(levels, j, where(is_better, code, load_bytes(levels, j)))
                    store(q, j, where(is_better, new, old))
                    store(moved, j, load(moved, j) - t)
                    for k in range(j + 1, stop):
                        store(r, k, load(r, k) - t * floats(moments[j, k]))
        for i in range(n):
            store(w, i, load(w, i) - load(q, i))
        write_tile(levels, flat_codes, starts, n)
        write_tile(w, flat_errors, starts, n)
        write_numbers(d, row, first // block, blocks, factors)
        write_numbers(dmin, row, first // block, blocks, minimum_factors)
        write_numbers(scale, row, first // sub, subs, scales)
        write_numbers(minimum, row, first // sub, subs, minimums)
        store(r, 0, gained)
        for i in range(min(LANES, rows - row)):
            gains[row + i] += r[i]
