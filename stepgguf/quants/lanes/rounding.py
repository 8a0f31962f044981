"""ggml's conversions between numbers, lane by lane: nearest_int, FP16 and back (ggml-quants.c, ggml-impl.h)."""

from __future__ import annotations

from typing import Any

from stepgguf.quants.lanes.compile import inlined
from stepgguf.quants.lanes.vector import absolute, bits, floats, ints, where


@inlined
def nearest_int(v: Any) -> Any:
    """f32 to the nearest i32, ties to even. Right for |v| < 2^22; beyond, ggml's garbage bit by bit."""
    return (bits(v + floats(12582912.0)) & ints(0x007FFFFF)) - ints(0x00400000)


@inlined
def clamp(level: Any, lowest: Any, highest: Any) -> Any:
    """MAX(lowest, MIN(highest, level)), all i32."""
    level = where(level > highest, highest, level)
    return where(level < lowest, lowest, level)


@inlined
def to_half(v: Any) -> Any:
    """f32 to the bits of FP16 in an i32, rounded to nearest even (ggml_compute_fp32_to_fp16)."""
    word = bits(v)
    doubled = word + word
    # Unsigned comparisons of the top byte: shifted down, they are signed ones.
    exponent = doubled >> ints(24)
    exponent = where(exponent < ints(0x71), ints(0x71), exponent)
    base = (absolute(v) * floats(2.0**112)) * floats(2.0**-110)
    base = bits((exponent << ints(23)) + ints(0x07800000)) + base
    rounded = bits(base)
    number = ((rounded >> ints(13)) & ints(0x7C00)) + (rounded & ints(0x0FFF))
    is_nan = (doubled >> ints(1)) > ints(0x7F800000)
    return ((word >> ints(16)) & ints(0x8000)) | where(is_nan, ints(0x7E00), number)


@inlined
def from_half(half: Any) -> Any:
    """The bits of an FP16 in an i32 to f32, exactly. Infinities and NaN stay what they are: a damaged block shows."""
    magnitude = bits((half & ints(0x7FFF)) << ints(13)) * floats(2.0**112)
    special = where((half & ints(0x7C00)) == ints(0x7C00), ints(0x7F800000), ints(0))
    return bits(bits(magnitude) | special | ((half & ints(0x8000)) << ints(16)))
