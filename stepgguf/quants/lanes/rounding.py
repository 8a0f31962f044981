"""ggml's conversions between numbers, lane by lane: nearest_int, FP16 and back (ggml-quants.c, ggml-impl.h)."""

from __future__ import annotations

from stepgguf.quants.lanes.compile import inlined
from stepgguf.quants.lanes.operands import F32Lanes, I32Lanes
from stepgguf.quants.lanes.vector import absolute, bits_of, float_of_bits, floats, ints, where


@inlined
def nearest_int(v: F32Lanes) -> I32Lanes:
    """f32 to the nearest i32, ties to even. Right for |v| < 2^22; beyond, ggml's garbage bit by bit."""
    # Added to 1.5 * 2^23, a number keeps no fraction: the integer is in the low 23 bits, 2^22 too high.
    return (bits_of(v + floats(12582912.0)) & ints(0x007FFFFF)) - ints(0x00400000)


@inlined
def clamp(level: I32Lanes, lowest: I32Lanes, highest: I32Lanes) -> I32Lanes:
    """The level, or the nearer end where it is not from lowest to highest."""
    level = where(level > highest, highest, level)
    return where(level < lowest, lowest, level)


@inlined
def to_half(v: F32Lanes) -> I32Lanes:
    """f32 to the bits of FP16 in an i32, rounded to nearest even (ggml_compute_fp32_to_fp16)."""
    word = bits_of(v)
    doubled = word + word  # without the sign: the exponent is the top byte
    # ggml compares the top byte unsigned; shifted down it is positive, so the signed comparison is right.
    exponent = doubled >> ints(24)
    exponent = where(exponent < ints(0x71), ints(0x71), exponent)  # FP16's denormals begin below 2^-14
    # Scaled up and down, what overflows FP16 becomes infinite and all else comes back times 4, exactly.
    base = (absolute(v) * floats(2.0**112)) * floats(2.0**-110)
    # Added to a power of two 2^15 above its exponent, a number is rounded to the 10 bits of FP16's fraction.
    base = float_of_bits((exponent << ints(23)) + ints(0x07800000)) + base
    rounded = bits_of(base)
    # Exponent and fraction are added, not joined: a fraction that was rounded up to 2^10 carries into the exponent.
    number = ((rounded >> ints(13)) & ints(0x7C00)) + (rounded & ints(0x0FFF))
    is_nan = (doubled >> ints(1)) > ints(0x7F800000)
    return ((word >> ints(16)) & ints(0x8000)) | where(is_nan, ints(0x7E00), number)


@inlined
def from_half(half: I32Lanes) -> F32Lanes:
    """The bits of an FP16 in an i32 to f32, exactly. Infinities and NaN stay what they are: a damaged block shows."""
    # Exponent and fraction go to float32's places; the biases are 15 and 127. Multiplying does denormals too.
    magnitude = float_of_bits((half & ints(0x7FFF)) << ints(13)) * floats(2.0**112)
    special = where((half & ints(0x7C00)) == ints(0x7C00), ints(0x7F800000), ints(0))
    return float_of_bits(bits_of(magnitude) | special | ((half & ints(0x8000)) << ints(16)))
