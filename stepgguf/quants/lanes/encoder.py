"""The loop around every encoder: tiles of LANES rows, block by block.

    rows -read_tile-> x [block][LANES] float32 -encode-> y [block bytes][LANES] -write_tile-> blocks of the rows

x and y stay in the first-level cache; nothing else is as long as a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from stepgguf.quants.lanes.compile import inlined, kernel
from stepgguf.quants.lanes.tile import lane_starts, read_tile, write_tile
from stepgguf.quants.lanes.vector import LANES, floats, load

FP8_TILE = 128  # columns that share a scale


@inlined
def read_block(
    flat: Any, scales: Any, n_rows: int, columns: int, row: int, column: int, n: int, starts: Any, factors: Any, x: Any
) -> Any:
    """n columns from `column` on of LANES rows from `row` on, widened, to x [n * LANES]. True if all are finite.

    starts, factors: scratch [LANES], int64 and float32.
    """
    if scales is None:
        lane_starts(n_rows, row, columns, column, starts)
        return read_tile(flat, starts, None, x, n)
    finite = True
    for first in range(0, n, FP8_TILE):
        lane_starts(n_rows, row, columns, column + first, starts)
        for r in range(LANES):
            factors[r] = scales[min(row + r, n_rows - 1), (column + first) // FP8_TILE]
        finite &= read_tile(flat, starts, factors, x[first * LANES :], min(n, FP8_TILE))
    return finite


@inlined
def _mean_square(
    flat: Any, scales: Any, n_rows: int, columns: int, row: int, n: int, starts: Any, factors: Any, x: Any
) -> Any:
    """Of each of LANES rows from `row` on: its squares added in order, divided by the columns. x: scratch for n."""
    total = floats(0.0)
    for column in range(0, columns, n):
        read_block(flat, scales, n_rows, columns, row, column, n, starts, factors, x)
        for i in range(n):
            v = load(x, i)
            total = total + v * v
    return total / floats(columns)


def encoder(name: str, block: int, block_bytes: int, encode: Callable[..., None], of_row: bool = False) -> Any:
    """A kernel (values, scales, importance, out) -> bool for one type.

    values      [rows, columns] float32, uint16 (BF16) or uint8 (FP8 E4M3), C-contiguous
    scales      None, or for FP8 [rows, column tiles] float32
    importance  None, or [columns] float32
    out         [rows, row bytes] uint8
    returns     whether all values are finite; if not, out is worthless

    encode(x, importance, y): x [block * LANES] float32, importance None or [block], y [block_bytes * LANES] uint8.
    of_row: it needs the mean square of the whole row where there is importance: encode(x, importance, y, mean_square).
    """
    if of_row:
        encode_block = encode
    else:

        @inlined
        def encode_block(x: Any, importance: Any, y: Any, mean_square: Any) -> None:
            encode(x, importance, y)

    def run(values: Any, scales: Any, importance: Any, out: Any) -> bool:
        n_rows, columns = values.shape
        row_bytes = out.shape[1]
        flat, flat_out = values.reshape(-1), out.reshape(-1)
        x, y = np.empty(block * LANES, np.float32), np.empty(block_bytes * LANES, np.uint8)
        starts, factors = np.empty(LANES, np.int64), np.empty(LANES, np.float32)
        finite = True
        for row in range(0, n_rows, LANES):
            mean_square = floats(0.0)
            if of_row and importance is not None:
                mean_square = _mean_square(flat, scales, n_rows, columns, row, block, starts, factors, x)
            for b in range(columns // block):
                finite &= read_block(flat, scales, n_rows, columns, row, b * block, block, starts, factors, x)
                if importance is None:
                    encode_block(x, None, y, mean_square)
                else:
                    encode_block(x, importance[b * block : (b + 1) * block], y, mean_square)
                lane_starts(n_rows, row, row_bytes, b * block_bytes, starts)
                write_tile(y, flat_out, starts, block_bytes)
        return finite

    return kernel(run, f"encode {name}")
