"""Descent of the error (w - q) H (w - q)^T, one number of a block at a time: codes, scales and minimums.

Along a direction v, what q gains when a number grows by 1, the error is a parabola:

    error(q + t v) = error(q) - t * (2 v.r - t * v.H v)        r = (w - q) H, the residual

so the best t is v.r / v.H v. It is rounded to what the format can store, and taken if the error falls. The residual of
a step's columns is a matrix product outside; inside, `moved` keeps what the step's q have lost since, so that

    r = residual + moved H

is right for a sub-block when it is visited, however many passes are made.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stepgguf.quants.lanes.blocks import inverse_or_zero
from stepgguf.quants.lanes.compile import inlined, kernel
from stepgguf.quants.lanes.operands import F32Lanes, F32Tile
from stepgguf.quants.lanes.part_tiles import (
    GROUP,
    Floats,
    PartTiles,
    Rules,
    add_products,
    limited,
    nearest_code,
    part_tiles,
    read_parts,
    step_of,
    value_at,
    value_of,
    write_numbers,
)
from stepgguf.quants.lanes.rounding import from_half, nearest_int, to_half
from stepgguf.quants.lanes.tile import fill_row_starts, read_bytes, read_tile, write_tile
from stepgguf.quants.lanes.vector import (
    LANES,
    f32_tile,
    floats,
    load,
    load_bytes,
    store,
    store_bytes,
    to_float,
    where,
)


class StepTiles(NamedTuple):
    """What is kept of each column of a step, of LANES rows."""

    residual: F32Tile  # when the step began
    moved: F32Tile  # q then, less q now
    q: F32Tile  # decoded values
    r: F32Tile  # the residual now, of the sub-block that is visited
    v: F32Tile  # scratch: a direction
    hv: F32Tile  # scratch: H v


@inlined
def _move(
    tiles: StepTiles, old: F32Lanes, wanted: F32Lanes, along: F32Lanes, curvature: F32Lanes, s: int, sub: int
) -> F32Lanes:
    """Old or wanted, whichever leaves the lower error, of a number along v; r follows."""
    t = wanted - old
    is_better = t * (along + along - t * curvature) > floats(0.0)
    t = where(is_better, t, floats(0.0))
    for i in range(s * sub, (s + 1) * sub):
        store(tiles.r, i, load(tiles.r, i) - t * load(tiles.hv, i))
    return where(is_better, wanted, old)


@inlined
def _measure_direction(tiles: StepTiles, moments: Floats, s: int, sub: int) -> tuple[F32Lanes, F32Lanes]:
    """(v.r, v.H v) in sub-block s; H v goes to hv."""
    start, stop = s * sub, (s + 1) * sub
    along, curvature = floats(0.0), floats(0.0)
    for i in range(start, stop):
        store(tiles.hv, i, floats(0.0))
    for column in range(start, stop, GROUP):
        add_products(tiles.v, start, stop, moments, column, tiles.hv)
    for i in range(start, stop):
        along = along + load(tiles.v, i) * load(tiles.r, i)
        curvature = curvature + load(tiles.v, i) * load(tiles.hv, i)
    return along, curvature


@inlined
def _refit_scale(tiles: StepTiles, parts: PartTiles, moments: Floats, s: int, rules: Rules) -> None:
    """The scale of sub-block s, or its factor where it has no scale."""
    b = s * rules.sub // rules.block
    factor = load(parts.factors, b)
    for i in range(s * rules.sub, (s + 1) * rules.sub):
        value = value_at(parts, i, rules)
        store(tiles.v, i, factor * value if rules.has_scales else value)
    along, curvature = _measure_direction(tiles, moments, s, rules.sub)
    t = along * inverse_or_zero(curvature)
    if rules.has_scales:
        old = load(parts.scales, s)
        wanted = to_float(nearest_int(limited(old + t, rules.lowest_scale, rules.highest_scale)))
        store(parts.scales, s, _move(tiles, old, wanted, along, curvature, s, rules.sub))
    else:
        # A block of zeros stays one: its codes say nothing.
        wanted = where(factor == floats(0.0), factor, from_half(to_half(factor + t)))
        store(parts.factors, b, _move(tiles, factor, wanted, along, curvature, s, rules.sub))


@inlined
def _refit_minimum(tiles: StepTiles, parts: PartTiles, moments: Floats, s: int, rules: Rules) -> None:
    """The minimum of sub-block s, or its factor where it has no minimum of its own."""
    b = s * rules.sub // rules.block
    factor = load(parts.minimum_factors, b)
    for i in range(s * rules.sub, (s + 1) * rules.sub):
        store(tiles.v, i, floats(0.0) - factor if rules.has_scales else floats(-1.0))
    along, curvature = _measure_direction(tiles, moments, s, rules.sub)
    t = along * inverse_or_zero(curvature)
    if rules.has_scales:
        old = load(parts.minimums, s)
        wanted = to_float(nearest_int(limited(old + t, 0, rules.highest_minimum)))
        store(parts.minimums, s, _move(tiles, old, wanted, along, curvature, s, rules.sub))
    else:
        wanted = from_half(to_half(factor + t))
        store(parts.minimum_factors, b, _move(tiles, factor, wanted, along, curvature, s, rules.sub))


@inlined
def _choose_codes(tiles: StepTiles, parts: PartTiles, moments: Floats, s: int, rules: Rules) -> None:
    """The codes of sub-block s, one after the other; q and moved follow what was refit, too."""
    start, stop = s * rules.sub, (s + 1) * rules.sub
    step, lowered = step_of(parts, s, rules)
    inverse = inverse_or_zero(step)
    for j in range(start, stop):
        before, rest, diagonal = load(tiles.q, j), load(tiles.r, j), moments[j, j]
        q = step * value_at(parts, j, rules) - lowered
        code = nearest_code((q + rest * floats(np.float32(1) / diagonal) + lowered) * inverse, rules)
        wanted = step * value_of(code, rules) - lowered
        t = wanted - q
        is_better = (t * (rest + rest - t * floats(diagonal)) > floats(0.0)) & (step != floats(0.0))
        t = where(is_better, t, floats(0.0))
        for k in range(j + 1, stop):
            store(tiles.r, k, load(tiles.r, k) - t * floats(moments[j, k]))
        q = where(is_better, wanted, q)
        store_bytes(parts.codes, j, where(is_better, code, load_bytes(parts.codes, j)))
        store(tiles.moved, j, load(tiles.moved, j) + (before - q))
        store(tiles.q, j, q)


@inlined
def _begin_step(tiles: StepTiles, parts: PartTiles, n: int, rules: Rules) -> None:
    """Decode the step's values; nothing has moved."""
    for s in range(n // rules.sub):
        step, lowered = step_of(parts, s, rules)
        for i in range(s * rules.sub, (s + 1) * rules.sub):
            store(tiles.q, i, step * value_at(parts, i, rules) - lowered)
            store(tiles.moved, i, floats(0.0))


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
    errors: Floats,
) -> None:
    """Improve the parts of a step of n columns from column `first` on, in place, in so many passes.

    weights     [rows, columns]
    residuals   [rows, n]: (weights - decoded values) H of the step's columns
    moments     [n, n]: H of the step's columns, its diagonal above 0
    factors     and so on: the parts of rows [rows, columns] (quants/parts)
    errors      [rows, columns], out: weights - decoded values
    """
    rows, columns = weights.shape
    n, sub = residuals.shape[1], rules.sub
    w, parts, starts = f32_tile(n), part_tiles(rules, n), np.empty(LANES, np.int64)
    tiles = StepTiles(f32_tile(n), f32_tile(n), f32_tile(n), f32_tile(n), f32_tile(n), f32_tile(n))
    flat_weights, flat_residuals = weights.reshape(-1), residuals.reshape(-1)
    flat_codes, flat_errors = codes.reshape(-1), errors.reshape(-1)
    for row in range(0, rows, LANES):
        fill_row_starts(rows, row, n, 0, starts)
        read_tile(flat_residuals, starts, None, tiles.residual, n)
        fill_row_starts(rows, row, columns, first, starts)
        read_tile(flat_weights, starts, None, w, n)
        read_bytes(flat_codes, starts, parts.codes, n)
        read_parts(factors, minimum_factors, scales, minimums, row, first, rules, parts)
        _begin_step(tiles, parts, n, rules)
        for turn in range(passes):
            for s in range(n // sub):
                for i in range(s * sub, (s + 1) * sub):
                    store(tiles.r, i, load(tiles.residual, i))
                for column in range(s * sub, (s + 1) * sub, GROUP):
                    # In the first pass nothing behind has moved yet.
                    add_products(tiles.moved, 0, s * sub if turn == 0 else n, moments, column, tiles.r)
                _refit_scale(tiles, parts, moments, s, rules)
                if rules.has_minimums:
                    _refit_minimum(tiles, parts, moments, s, rules)
                _choose_codes(tiles, parts, moments, s, rules)
        for i in range(n):
            store(w, i, load(w, i) - load(tiles.q, i))
        write_tile(w, flat_errors, starts, n)
        write_tile(parts.codes, flat_codes, starts, n)
        write_numbers(parts.factors, row, first // rules.block, factors)
        write_numbers(parts.minimum_factors, row, first // rules.block, minimum_factors)
        write_numbers(parts.scales, row, first // sub, scales)
        write_numbers(parts.minimums, row, first // sub, minimums)
