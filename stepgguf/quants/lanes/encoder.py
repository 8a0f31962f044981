"""The loop around every encoder: tiles of LANES rows, block by block.

    rows -read_tile-> x [block][LANES] float32 -encode-> y [block bytes][LANES] -write_tile-> blocks of the rows

x and y stay in the first-level cache; nothing else is as long as a row.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stepgguf.quants.lanes.compile import inlined, kernel
from stepgguf.quants.lanes.operands import EncodeBlockOfRow, EncodeRows, F32Lanes, F32Tile, Importance, Scales, Stored
from stepgguf.quants.lanes.tile import fill_row_starts, read_tile, write_tile
from stepgguf.quants.lanes.vector import LANES, byte_tile, f32_tile, floats, load

COLUMNS_OF_SCALE = 128  # columns of FP8 rows that share a factor


class StoredRows(NamedTuple):
    """Rows as a checkpoint has them, and what is reused in reading blocks of them."""

    flat: Stored
    n_rows: int
    columns: int
    starts: NDArray[np.int64]  # scratch [LANES]
    factors: NDArray[np.float32]  # scratch [LANES]


@inlined
def open_rows(values: Stored) -> StoredRows:
    """The rows of a kernel's values [rows, columns], with scratch of their own."""
    n_rows, columns = values.shape
    starts, factors = np.empty(LANES, np.int64), np.empty(LANES, np.float32)
    return StoredRows(values.reshape(-1), n_rows, columns, starts, factors)


@inlined
def read_block(rows: StoredRows, scales: Scales, row: int, column: int, n: int, x: F32Tile) -> bool:
    """Read n columns from `column` on of LANES rows from `row` on, widened, to x [n]. True if all are finite."""
    if scales is None:
        fill_row_starts(rows.n_rows, row, rows.columns, column, rows.starts)
        return read_tile(rows.flat, rows.starts, None, x, n)
    finite = True
    # A block of 256 values crosses into the next factor's columns.
    for first in range(0, n, COLUMNS_OF_SCALE):
        fill_row_starts(rows.n_rows, row, rows.columns, column + first, rows.starts)
        for r in range(LANES):
            rows.factors[r] = scales[min(row + r, rows.n_rows - 1), (column + first) // COLUMNS_OF_SCALE]
        finite &= read_tile(rows.flat, rows.starts, rows.factors, x[first * LANES :], min(n, COLUMNS_OF_SCALE))
    return finite


@inlined
def _mean_square(rows: StoredRows, scales: Scales, row: int, n: int, x: F32Tile) -> F32Lanes:
    """The mean square of each of LANES rows from `row` on, whose squares are added in order. x: scratch for n."""
    total = floats(0.0)
    for column in range(0, rows.columns, n):
        read_block(rows, scales, row, column, n, x)
        for i in range(n):
            v = load(x, i)
            total = total + v * v
    return total / floats(rows.columns)


def make_encoder(name: str, block: int, block_bytes: int, encode: EncodeBlockOfRow, of_row: bool) -> EncodeRows:
    """A kernel (values, scales, importance, out) -> bool for one type.

    values      [rows, columns] float32, uint16 (BF16) or uint8 (FP8 E4M3), C-contiguous
    scales      None, or for FP8 [rows, column tiles] float32
    importance  None, or [columns] float32
    out         [rows, row bytes] uint8
    returns     whether all values are finite; if not, out is worthless

    encode(x, importance, y, mean_square): x [block] float32, importance None or [block], y [block_bytes] uint8,
    mean_square of the whole row if `of_row` is set and there is importance, else 0.
    """

    def encode_rows(values: Stored, scales: Scales, importance: Importance, out: NDArray[np.uint8]) -> bool:
        rows = open_rows(values)
        row_bytes, flat_out = out.shape[1], out.reshape(-1)
        x, y = f32_tile(block), byte_tile(block_bytes)
        finite = True
        for row in range(0, rows.n_rows, LANES):
            mean_square = floats(0.0)
            if of_row and importance is not None:
                mean_square = _mean_square(rows, scales, row, block, x)
            for b in range(rows.columns // block):
                finite &= read_block(rows, scales, row, b * block, block, x)
                # Two calls: numba compiles each for one type of importance, and only one of them remains.
                if importance is None:
                    encode(x, None, y, mean_square)
                else:
                    encode(x, importance[b * block : (b + 1) * block], y, mean_square)
                fill_row_starts(rows.n_rows, row, row_bytes, b * block_bytes, rows.starts)
                write_tile(y, flat_out, rows.starts, block_bytes)
        return finite

    return kernel(encode_rows, f"encode {name}")
