"""Our own kernels: ggml's bytes, several times faster, one file per family of types. The only place for numba.

From the ground up:

operands        what kernels compute with, as a reader and a type checker see it
compile         how and when LLVM runs          primitive       operations given as LLVM instructions
vector          lane vectors: the arithmetic    tile            rows to lanes and back
rounding        numbers to numbers              blocks          what families share
search          ggml's searches for a scale     lattice         grids of IQ2 and IQ3, and the fit to them
closest, direct the search for a grid's point   iq_blocks       what IQ2 and IQ3 share
encoder         the loop around an encoder      decoder         around a decoder, and the error between the two
lane_kernels    a type: all three, made into kernels
plain, k_mins, k_scales, iq4, iq3, iq2          the families
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from gguf import GGMLQuantizationType

if TYPE_CHECKING:
    from stepgguf.quants.lanes.lane_kernels import LaneKernels

_FAMILIES = {
    "k_mins": ("Q2_K", "Q4_K", "Q5_K"),
    "k_scales": ("Q3_K", "Q6_K"),
    "iq4": ("IQ4_NL", "IQ4_XS"),
    "iq3": ("IQ3_XXS", "IQ3_S"),
    "iq2": ("IQ2_XXS", "IQ2_XS", "IQ2_S"),
    "plain": ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4"),
}
_MODULES = {name: family for family, names in _FAMILIES.items() for name in names}
NAMES = tuple(_MODULES)


def has(ggml_type: GGMLQuantizationType) -> bool:
    """Whether there are kernels for the type."""
    return ggml_type.name in _MODULES


def lane_type(ggml_type: GGMLQuantizationType) -> LaneKernels | None:
    """The type's kernels, or None. Imports numba when it is first asked."""
    family = _MODULES.get(ggml_type.name)
    if family is None:
        return None
    types: dict[str, LaneKernels] = importlib.import_module(f"{__name__}.{family}").TYPES
    return types[ggml_type.name]


def is_compiled(function: Callable[..., object], arguments: tuple[object, ...]) -> bool:
    """Whether a kernel is compiled for such arguments, in this process or on the disk."""
    from stepgguf.quants.lanes.compile import is_cached

    return is_cached(function, arguments)
