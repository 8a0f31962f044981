"""A type's kernels, made of its family's two functions on a block of LANES rows."""

from __future__ import annotations

from dataclasses import dataclass

from stepgguf.quants.lanes.compile import inlined
from stepgguf.quants.lanes.decoder import make_decoder, make_measurer
from stepgguf.quants.lanes.encoder import make_encoder
from stepgguf.quants.lanes.operands import (
    ByteTile,
    DecodeBlock,
    DecodeRows,
    EncodeBlock,
    EncodeBlockOfRow,
    EncodeRows,
    F32Lanes,
    F32Tile,
    Importance,
    MeasureRows,
)
from stepgguf.quants.types import BY_NAME


@dataclass(frozen=True, slots=True)
class LaneKernels:
    """Kernels on whole rows, with their arguments described where they are made: encoder.py, decoder.py."""

    encode: EncodeRows
    decode: DecodeRows
    measure: MeasureRows


def define_type(name: str, encode: EncodeBlock, decode: DecodeBlock) -> LaneKernels:
    """The kernels of the type of that name.

    encode(x, importance, y), decode(y, z): x, z [block] float32, y [block bytes] uint8, of LANES rows each.
    """

    @inlined
    def encode_block(x: F32Tile, importance: Importance, y: ByteTile, mean_square: F32Lanes) -> None:
        encode(x, importance, y)

    return _make_kernels(name, encode_block, decode, of_row=False)


def define_type_of_row(name: str, encode: EncodeBlockOfRow, decode: DecodeBlock) -> LaneKernels:
    """As define_type, for a type whose encoder also takes the mean square of the whole row, where it has importance."""
    return _make_kernels(name, encode, decode, of_row=True)


def _make_kernels(name: str, encode: EncodeBlockOfRow, decode: DecodeBlock, of_row: bool) -> LaneKernels:
    block, block_bytes = BY_NAME[name].block, BY_NAME[name].block_bytes
    return LaneKernels(
        make_encoder(name, block, block_bytes, encode, of_row),
        make_decoder(name, block, block_bytes, decode),
        make_measurer(name, block, block_bytes, decode),
    )
