"""The loops around every decoder: blocks to numbers, and how far they are from what they stand for.

blocks of LANES rows -read_bytes-> y [block bytes][LANES] -decode-> z [block][LANES] float32
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from stepgguf.quants.lanes.compile import inlined, kernel
from stepgguf.quants.lanes.encoder import open_rows, read_block
from stepgguf.quants.lanes.operands import DecodeBlock, DecodeRows, F32Tile, Importance, MeasureRows, Scales, Stored
from stepgguf.quants.lanes.tile import fill_row_starts, read_bytes, write_tile
from stepgguf.quants.lanes.vector import LANES, byte_tile, f32_tile, floats, load, store


def make_decoder(name: str, block: int, block_bytes: int, decode: DecodeBlock) -> DecodeRows:
    """A kernel (blocks, out): blocks [rows, row bytes] uint8, out [rows, columns] float32.

    decode(y, z): y [block_bytes] uint8, z [block] float32, of LANES rows.
    """

    def decode_rows(blocks: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
        n_rows, columns = out.shape
        row_bytes = blocks.shape[1]
        flat, flat_out = blocks.reshape(-1), out.reshape(-1)
        y, z = byte_tile(block_bytes), f32_tile(block)
        starts = np.empty(LANES, np.int64)
        for row in range(0, n_rows, LANES):
            for b in range(columns // block):
                fill_row_starts(n_rows, row, row_bytes, b * block_bytes, starts)
                read_bytes(flat, starts, y, block_bytes)
                decode(y, z)
                fill_row_starts(n_rows, row, columns, b * block, starts)
                write_tile(z, flat_out, starts, block)

    return kernel(decode_rows, f"decode {name}")


def make_measurer(name: str, block: int, block_bytes: int, decode: DecodeBlock) -> MeasureRows:
    """A kernel (values, scales, importance, blocks, sums): what the blocks lost of the values.

    Adds to sums [3] float64: importance * (value - decoded)^2, importance * value^2, (value - decoded)^2. Arguments
    as an encoder's (encoder.py); without importance it is 1.
    """

    def measure_rows(
        values: Stored, scales: Scales, importance: Importance, blocks: NDArray[np.uint8], sums: NDArray[np.float64]
    ) -> None:
        rows = open_rows(values)
        row_bytes, flat_blocks = blocks.shape[1], blocks.reshape(-1)
        x, y, z, row_sums = f32_tile(block), byte_tile(block_bytes), f32_tile(block), f32_tile(3)
        for row in range(0, rows.n_rows, LANES):
            row_sums[:] = 0.0
            for b in range(rows.columns // block):
                read_block(rows, scales, row, b * block, block, x)
                fill_row_starts(rows.n_rows, row, row_bytes, b * block_bytes, rows.starts)
                read_bytes(flat_blocks, rows.starts, y, block_bytes)
                decode(y, z)
                _add_losses(
                    x, z, None if importance is None else importance[b * block : (b + 1) * block], block, row_sums
                )
            # float32 along a row, float64 over rows; lanes beyond the last row repeat it and do not count.
            for r in range(min(LANES, rows.n_rows - row)):
                for i in range(3):
                    sums[i] += row_sums[i * LANES + r]

    return kernel(measure_rows, f"measure {name}")


@inlined
def _add_losses(x: F32Tile, z: F32Tile, importance: Importance, n: int, sums: F32Tile) -> None:
    """Add what n decoded values z lost of the values x to sums [3], in the order that make_measurer says."""
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
