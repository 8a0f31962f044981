"""What kernels compute with, as a reader and a type checker see it. numba sees vector.py's types and infers its own.

The annotations of kernels name these, so mypy refuses floats where integers belong. At run time nothing reads them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

Number = TypeVar("Number", bound=np.generic)
Bits = TypeVar("Bits", np.int32, np.bool_)


class Lanes(Protocol[Number]):
    """A lane vector: LANES values, one of each row of a tile. Operators work lane by lane; lanes never meet."""

    def __add__(self, other: Lanes[Number], /) -> Lanes[Number]: ...
    def __sub__(self, other: Lanes[Number], /) -> Lanes[Number]: ...
    def __mul__(self, other: Lanes[Number], /) -> Lanes[Number]: ...
    def __truediv__(self: F32Lanes, other: F32Lanes, /) -> F32Lanes: ...
    def __and__(self: Lanes[Bits], other: Lanes[Bits], /) -> Lanes[Bits]: ...
    def __or__(self: Lanes[Bits], other: Lanes[Bits], /) -> Lanes[Bits]: ...
    def __xor__(self: Lanes[Bits], other: Lanes[Bits], /) -> Lanes[Bits]: ...
    def __lshift__(self: I32Lanes, other: I32Lanes, /) -> I32Lanes: ...
    def __rshift__(self: I32Lanes, other: I32Lanes, /) -> I32Lanes: ...
    def __lt__(self, other: Lanes[Number], /) -> Mask: ...
    def __le__(self, other: Lanes[Number], /) -> Mask: ...
    def __gt__(self, other: Lanes[Number], /) -> Mask: ...
    def __ge__(self, other: Lanes[Number], /) -> Mask: ...
    def __eq__(self, other: Lanes[Number], /) -> Mask: ...  # type: ignore[override]
    def __ne__(self, other: Lanes[Number], /) -> Mask: ...  # type: ignore[override]


# LANES float32 values, one row each.
F32Lanes: TypeAlias = Lanes[np.float32]
# LANES int32 values, one row each: levels, codes, bytes and words of a block.
I32Lanes: TypeAlias = Lanes[np.int32]
# LANES truth values, one row each: what a comparison gives and `where` takes.
Mask: TypeAlias = Lanes[np.bool_]

# Lane vectors one after another in memory, flat: [n * LANES] stands for [n][LANES]. `load(tile, i)` is vector i.
F32Tile: TypeAlias = NDArray[np.float32]
I32Tile: TypeAlias = NDArray[np.int32]
# Lane vectors of bytes, which `load_bytes` and `store_bytes` widen and narrow: small levels, the bytes of a block.
ByteTile: TypeAlias = NDArray[np.uint8]

# Rows as a checkpoint stores them: float32, BF16 as uint16, or FP8 E4M3 as uint8.
Stored: TypeAlias = NDArray[np.float32] | NDArray[np.uint16] | NDArray[np.uint8]
# The factors of FP8 rows: [rows, ceil(columns / 128)] float32; None for rows that need no factor.
Scales: TypeAlias = NDArray[np.float32] | None
# The importance of each column, the same for all rows: [columns] float32, in a block's encoder its own [block].
Importance: TypeAlias = NDArray[np.float32] | None

# Kernels for whole rows (encoder.py, decoder.py say more): (values, scales, importance, blocks) -> are all finite;
# (blocks, out) -> None; (values, scales, importance, blocks, sums) -> None.
EncodeRows: TypeAlias = Callable[[Stored, Scales, Importance, NDArray[np.uint8]], bool]
DecodeRows: TypeAlias = Callable[[NDArray[np.uint8], NDArray[np.float32]], None]
MeasureRows: TypeAlias = Callable[[Stored, Scales, Importance, NDArray[np.uint8], NDArray[np.float64]], None]

# A family's functions on one block of LANES rows: (x, importance, y), (x, importance, y, mean square), (y, z).
EncodeBlock: TypeAlias = Callable[[F32Tile, Importance, ByteTile], None]
EncodeBlockOfRow: TypeAlias = Callable[[F32Tile, Importance, ByteTile, F32Lanes], None]
DecodeBlock: TypeAlias = Callable[[ByteTile, F32Tile], None]
