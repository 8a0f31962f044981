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


def has(kind: GGMLQuantizationType) -> bool:
    """Whether there are kernels for the type."""
    return kind.name in _MODULES


def lane_type(kind: GGMLQuantizationType) -> Any | None:
    """The type's kernels (lanetype.LaneType), or None. Imports numba when it is first asked."""
    family = _MODULES.get(kind.name)
    if family is None:
        return None
    return importlib.import_module(f"{__name__}.{family}").TYPES[kind.name]


def is_compiled(function: Any, arguments: tuple[Any, ...]) -> bool:
    """Whether a kernel is compiled for such arguments, in this process or on the disk."""
    from stepgguf.quants.lanes.compile import is_cached

    return is_cached(function, arguments)
