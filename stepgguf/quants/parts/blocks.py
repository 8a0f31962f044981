"""Rows of blocks to their parts and back (layout.py has the formula and where each number stands)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from stepgguf.quants.parts.layout import TABLE, Layout, Numbers
from stepgguf.quants.types import quant_type

Blocks = NDArray[np.uint8]
Floats = NDArray[np.float32]


class Parts(NamedTuple):
    """The numbers of rows of blocks. Scales and minimums are whole numbers; 1 where a type has none of its own.

    A type without minimums has 0 for `minimum_factors`.
    """

    factors: Floats  # [rows, blocks], as FP16 holds them
    minimum_factors: Floats  # [rows, blocks], likewise
    scales: Floats  # [rows, sub-blocks]
    minimums: Floats  # [rows, sub-blocks]
    codes: Blocks  # [rows, columns]

    def columns(self, layout: Layout, columns: slice) -> Parts:
        """Views of columns that are whole blocks."""
        blocks = slice(columns.start // layout.block, columns.stop // layout.block)
        subs = slice(columns.start // layout.sub, columns.stop // layout.sub)
        return Parts(
            self.factors[:, blocks],
            self.minimum_factors[:, blocks],
            self.scales[:, subs],
            self.minimums[:, subs],
            self.codes[:, columns],
        )

    def fill(self, other: Parts) -> None:
        """Copy other parts of the same shape into these arrays."""
        self.factors[:], self.minimum_factors[:] = other.factors, other.minimum_factors
        self.scales[:], self.minimums[:], self.codes[:] = other.scales, other.minimums, other.codes


def empty_parts(layout: Layout, rows: int, columns: int) -> Parts:
    """Room for the parts of rows [rows, columns]."""
    factors, minimum_factors = np.empty((2, rows, columns // layout.block), np.float32)
    scales, minimums = np.empty((2, rows, columns // layout.sub), np.float32)
    return Parts(factors, minimum_factors, scales, minimums, np.empty((rows, columns), np.uint8))


def take_apart(ggml_type: GGMLQuantizationType, data: Blocks) -> Parts:
    """The parts of data [rows, row bytes] of a type in TABLE."""
    layout, blocks = TABLE[ggml_type], _split(ggml_type, data)
    subs = layout.block // layout.sub
    codes = _read(blocks, layout.codes, layout.block)
    scales, minimums = _read_whole(blocks, layout.scales, subs), _read_whole(blocks, layout.minimums, subs)
    factors = _read_half(blocks, layout.factor)
    if layout.minimum_factor is None:
        return Parts(factors, np.zeros_like(factors), scales, minimums, codes)
    lowered = _read_half(blocks, layout.minimum_factor)
    return Parts(factors, -lowered if layout.added_minimum else lowered, scales, minimums, codes)


def pack(ggml_type: GGMLQuantizationType, parts: Parts) -> Blocks:
    """The blocks [rows, row bytes] that have these parts."""
    layout, (rows, columns) = TABLE[ggml_type], parts.codes.shape
    blocks = np.zeros((rows, columns // layout.block, quant_type(ggml_type).block_bytes), np.uint8)
    _write(blocks, layout.codes, parts.codes)
    if layout.scales is not None:
        _write(blocks, layout.scales, (parts.scales + layout.scales.zero).astype(np.uint8))
    if layout.minimums is not None:
        _write(blocks, layout.minimums, parts.minimums.astype(np.uint8))
    _write_half(blocks, layout.factor, parts.factors)
    if layout.minimum_factor is not None:
        lowered = -parts.minimum_factors if layout.added_minimum else parts.minimum_factors
        _write_half(blocks, layout.minimum_factor, lowered)
    return blocks.reshape(rows, -1)


def _split(ggml_type: GGMLQuantizationType, data: Blocks) -> Blocks:
    """Rows as [rows, blocks, block bytes]."""
    return data.reshape(len(data), -1, quant_type(ggml_type).block_bytes)


def _read(blocks: Blocks, numbers: Numbers, n: int) -> Blocks:
    """The n numbers of each block, as stored without a sign: [rows, blocks * n]."""
    out = np.zeros((*blocks.shape[:2], n), np.uint8)
    for field in numbers.fields:
        bits = blocks[..., field.offset : field.offset + field.n] >> field.right
        bits &= (1 << field.bits) - 1
        out[..., field.first : field.first + field.n] |= bits << field.left
    if numbers.signed:
        out ^= 0x80
    return out.reshape(len(out), -1)


def _write(blocks: Blocks, numbers: Numbers, stored: Blocks) -> None:
    """The inverse of _read, into blocks whose bits are 0."""
    stored = stored.reshape(*blocks.shape[:2], -1)
    if numbers.signed:
        stored = stored ^ np.uint8(0x80)
    for field in numbers.fields:
        bits = stored[..., field.first : field.first + field.n] >> field.left
        bits &= (1 << field.bits) - 1
        blocks[..., field.offset : field.offset + field.n] |= bits << field.right


def _read_whole(blocks: Blocks, numbers: Numbers | None, n: int) -> Floats:
    """The n numbers of each block, 1 where the type has none: [rows, blocks * n]."""
    if numbers is None:
        return np.ones((len(blocks), blocks.shape[1] * n), np.float32)
    whole: Floats = _read(blocks, numbers, n).astype(np.float32)
    whole -= numbers.zero
    return whole


def _read_half(blocks: Blocks, offset: int) -> Floats:
    """The FP16 number at a byte offset of each block: [rows, blocks]."""
    halves = np.ascontiguousarray(blocks[..., offset : offset + 2]).view(np.float16)
    numbers: Floats = halves[..., 0].astype(np.float32)
    return numbers


def _write_half(blocks: Blocks, offset: int, numbers: Floats) -> None:
    blocks[..., offset : offset + 2] = numbers.astype(np.float16)[..., None].view(np.uint8)
