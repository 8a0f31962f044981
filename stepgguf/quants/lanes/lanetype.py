"""A type as its family's file defines it: two functions on a block of LANES rows; and the kernels made of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from stepgguf.quants.lanes.decoder import decoder, measurer
from stepgguf.quants.lanes.encoder import encoder


@dataclass(frozen=True, slots=True)
class LaneType:
    """Kernels, with their arguments described where they are made: encoder.py, decoder.py."""

    encode: Any
    decode: Any
    measure: Any


def lane_type(
    name: str,
    block: int,
    block_bytes: int,
    encode: Callable[..., None],
    decode: Callable[..., None],
    of_row: bool = False,
) -> LaneType:
    """The type whose blocks of `block` values take block_bytes.

    encode(x, importance, y), decode(y, z): x, z [block * LANES] float32, y [block_bytes * LANES] uint8.
    of_row: encode takes a fourth argument (encoder.py).
    """
    return LaneType(
        encoder(name, block, block_bytes, encode, of_row),
        decoder(name, block, block_bytes, decode),
        measurer(name, block, block_bytes, decode),
    )
