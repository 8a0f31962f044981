"""The loops around every decoder: blocks to numbers, and how far they are from what they stand for.

blocks of LANES rows -read_bytes-> y [block bytes][LANES] -decode-> z [block][LANES] float32
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from stepgguf.quants.lanes.compile import inlined, kernel
from stepgguf.quants.lanes.encoder import read_block
from stepgguf.quants.lanes.tile import lane_starts, read_bytes, write_tile
from stepgguf.quants.lanes.vector import LANES, floats, load, store


def decoder(name: str, block: int, block_bytes: int, decode: Callable[..., None]) -> Any:
    """A kernel (blocks, out): blocks [rows, row bytes] uint8, out [rows, columns] float32.

    decode(y, z): y [block_bytes * LANES] uint8, z [block * LANES] float32.
    """

    def run(blocks: Any, out: Any) -> None:
        n_rows, columns = out.shape
        row_bytes = blocks.shape[1]
        flat, flat_out = blocks.reshape(-1), out.reshape(-1)
        y, z = np.empty(block_bytes * LANES, np.uint8), np.empty(block * LANES, np.float32)
        starts = np.empty(LANES, np.int64)
        for row in range(0, n_rows, LANES):
            for b in range(columns // block):
                lane_starts(n_rows, row, row_bytes, b * block_bytes, starts)
                read_bytes(flat, starts, y, block_bytes)
                decode(y, z)
                lane_starts(n_rows, row, columns, b * block, starts)
                write_tile(z, flat_out, starts, block)

    return kernel(run, f"decode {name}")


def measurer(name: str, block: int, block_bytes: int, decode: Callable[..., None]) -> Any:
    """A kernel (values, scales, importance, blocks, sums): what the blocks lost of the values.

    Adds to sums [3] float64: importance * (value - decoded)^2, importance * value^2, (value - decoded)^2. Arguments
    as an encoder's (encoder.py); without importance it is 1.
    """

    def run(values: Any, scales: Any, importance: Any, blocks: Any, sums: Any) -> None:
        n_rows, columns = values.shape
        row_bytes = blocks.shape[1]
        flat, flat_blocks = values.reshape(-1), blocks.reshape(-1)
        x, z = np.empty(block * LANES, np.float32), np.empty(block * LANES, np.float32)
        y = np.empty(block_bytes * LANES, np.uint8)
        starts, factors = np.empty(LANES, np.int64), np.empty(LANES, np.float32)
        row_sums = np.empty(3 * LANES, np.float32)
        for row in range(0, n_rows, LANES):
            row_sums[:] = 0.0
            for b in range(columns // block):
                read_block(flat, scales, n_rows, columns, row, b * block, block, starts, factors, x)
                lane_starts(n_rows, row, row_bytes, b * block_bytes, starts)
                read_bytes(flat_blocks, starts, y, block_bytes)
                decode(y, z)
                _add(x, z, None if importance is None else importance[b * block : (b + 1) * block], block, row_sums)
            for r in range(min(LANES, n_rows - row)):
                for i in range(3):
                    sums[i] += row_sums[i * LANES + r]

    return kernel(run, f"measure {name}")


@inlined
def _add(x: Any, z: Any, importance: Any, n: int, sums: Any) -> None:
    weighted, energy, squared = load(sums, 0), load(sums, 1), load(sums, 2)
    for i in range(n):
        v = load(x, i)
        difference = v - load(z, i)
        square = difference * difference
        squared = squared + square
        if importance is not None:
            weight = floats(importance[i])
            weighted = weighted + weight * square
            energy = energy + weight * v * v
        else:
            energy = energy + v * v
    store(sums, 0, squared if importance is None else weighted)
    store(sums, 1, energy)
    store(sums, 2, squared)
