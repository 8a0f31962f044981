"""Our own kernels: ggml's bytes, several times faster, one file per family of types. The only place for numba.

compile     how and when LLVM runs          vector      lane vectors: the arithmetic
tile        rows to lanes and back          rounding    numbers to numbers
blocks      what families share            search      ggml's searches for a scale
iq_blocks   what IQ2 and IQ3 share         lattice     their grids; closest, direct: the search for a point
encoder     the loop around an encoder      decoder     around a decoder, and the error between the two
lanetype    a type: both, made into kernels
"""

from __future__ import annotations

import importlib
from typing import Any

from gguf import GGMLQuantizationType

from stepgguf.quants.types import TABLE, quant_type

NAMES = tuple(row.name for row in TABLE if row.lanes is not None)


def lane_type(ggml_type: GGMLQuantizationType) -> Any | None:
    """The type's kernels (lanetype.LaneType), or None. Imports numba when it is first asked."""
    family = quant_type(ggml_type).lanes
    if family is None:
        return None
    return importlib.import_module(f"{__name__}.{family}").TYPES[ggml_type.name]


def is_compiled(function: Any, arguments: tuple[Any, ...]) -> bool:
    """Whether a kernel is compiled for such arguments, in this process or on the disk."""
    from stepgguf.quants.lanes.compile import is_cached

    return is_cached(function, arguments)
