"""Our own kernels: ggml's bytes, several times faster, one file per family of types. The only place for numba.

From the ground up:

operands        what kernels compute with, as a reader and a type checker see it
compile         how and when LLVM runs          primitive       operations given as LLVM instructions
vector          lane vectors: the arithmetic    tile            rows to lanes and back
rounding        numbers to numbers              blocks          what families share
search          ggml's searches for a scale     grid, lattice   the grids of IQ2 and IQ3, the fit to them
closest, direct the search for a grid's point   iq_blocks       what IQ2 and IQ3 share
encoder         the loop around an encoder      decoder         around a decoder, and the error between the two
lane_kernels    a type: all three, made into kernels
plain, k_mins, k_scales, iq4, iq3, iq2          the families
part_tiles      blocks taken apart              feedback, descent   their codes, against second moments
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from gguf import GGMLQuantizationType

from stepgguf.quants.types import TABLE, quant_type

if TYPE_CHECKING:
    from stepgguf.quants.lanes.lane_kernels import LaneKernels

NAMES = tuple(row.name for row in TABLE if row.lanes is not None)


def kernels_of(ggml_type: GGMLQuantizationType) -> LaneKernels | None:
    """The type's kernels, or None where no family has it. Imports numba when it is first asked."""
    family = quant_type(ggml_type).lanes
    if family is None:
        return None
    types: dict[str, LaneKernels] = importlib.import_module(f"{__name__}.{family}").TYPES
    return types[ggml_type.name]


def is_compiled(function: Callable[..., object], arguments: tuple[object, ...]) -> bool:
    """Whether a kernel is compiled for such arguments, in this process or on the disk."""
    from stepgguf.quants.lanes.compile import is_cached

    return is_cached(function, arguments)
