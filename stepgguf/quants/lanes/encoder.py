"""The loop around every encoder: tiles of LANES rows, block by block.

    rows -read_tile-> x [block][LANES] float32 -encode-> y [block bytes][LANES] -write_tile-> blocks of the rows

x and y stay in the first-level cache; nothing else is as long as a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from stepgguf.quants.lanes.compile import kernel
from stepgguf.quants.lanes.tile import lane_starts, read_tile, write_tile
from stepgguf.quants.lanes.vector import LANES

FP8_TILE = 128  # columns that share a scale


def encoder(name: str, block: int, block_bytes: int, encode: Callable[..., None]) -> Any:
    """A kernel (values, scales, importance, out) -> bool for one type.

    values      [rows, columns] float32, uint16 (BF16) or uint8 (FP8 E4M3), C-contiguous
    scales      None, or for FP8 [rows, column tiles] float32
    importance  None, or [columns] float32
    out         [rows, row bytes] uint8
    returns     whether all values are finite; if not, out is worthless

    encode(x, importance, y): x [block * LANES] float32, importance None or [block], y [block_bytes * LANES] uint8.
    """

    def run(values: Any, scales: Any, importance: Any, out: Any) -> bool:
        n_rows, columns = values.shape
        row_bytes = out.shape[1]
        flat, flat_out = values.reshape(-1), out.reshape(-1)
        x, y = np.empty(block * LANES, np.float32), np.empty(block_bytes * LANES, np.uint8)
        starts, factors = np.empty(LANES, np.int64), np.empty(LANES, np.float32)
        finite = True
        for row in range(0, n_rows, LANES):
            for b in range(columns // block):
                if scales is None:
                    lane_starts(n_rows, row, columns, b * block, starts)
                    finite &= read_tile(flat, starts, None, x, block)
                else:
                    for column in range(0, block, FP8_TILE):
                        lane_starts(n_rows, row, columns, b * block + column, starts)
                        for r in range(LANES):
                            factors[r] = scales[min(row + r, n_rows - 1), (b * block + column) // FP8_TILE]
                        size = min(block, FP8_TILE)
                        finite &= read_tile(flat, starts, factors, x[column * LANES :], size)
                if importance is None:
                    encode(x, None, y)
                else:
                    encode(x, importance[b * block : (b + 1) * block], y)
                lane_starts(n_rows, row, row_bytes, b * block_bytes, starts)
                write_tile(y, flat_out, starts, block_bytes)
        return finite

    return kernel(run, f"encode {name}")
