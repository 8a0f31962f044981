"""THE table of tensor types: one row for each that can be asked for, with everything that this program knows about it.

Sizes of blocks are gguf's (GGML_QUANT_SIZES); the rest is a row here. A new type is a row, and a file of lanes if it
shall be encoded fast.

A GGUF may hold types that are not in the table (integers, F64, types of newer programs): `quant_type` describes those
too, by their sizes alone, so that they can be copied.
"""

from __future__ import annotations

from dataclasses import dataclass

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from stepgguf.errors import QuantError

T = GGMLQuantizationType
FLOATS = F32, F16, BF16 = T.F32, T.F16, T.BF16


@dataclass(frozen=True, slots=True)
class QuantType:
    """One type of tensors.

    lanes       the file in lanes/ that encodes and decodes it, if one does
    numpy       gguf-py's numpy code encodes it too, where ggml's library is not installed
    fallback    what takes its place on rows that its blocks do not divide (llama.cpp's tensor_type_fallback)
    imatrix     llama-quantize refuses it without an importance matrix
    aborts      and ggml itself ends the process then (ggml.c, ggml_quantize_requires_imatrix)
    grid        values are snapped to a grid; ggml ends the process where they are so large that no point is closest
    factors     where a block has its FP16 factors: byte offsets. Known for what lanes encode, which check them
    measured    what is lost as this type is measured before a budget is spent
    aliases     what people also call it
    """

    ggml_type: GGMLQuantizationType
    lanes: str | None = None
    numpy: bool = False
    fallback: GGMLQuantizationType | None = None
    imatrix: bool = False
    aborts: bool = False
    grid: bool = False
    factors: tuple[int, ...] = ()
    measured: bool = False
    aliases: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """ggml's name: Q4_K."""
        return self.ggml_type.name

    @property
    def block(self) -> int:
        """Values in a block; 1 for floats."""
        return GGML_QUANT_SIZES[self.ggml_type][0]

    @property
    def block_bytes(self) -> int:
        """Bytes that a block takes."""
        return GGML_QUANT_SIZES[self.ggml_type][1]

    @property
    def bpw(self) -> float:
        """Bits per weight."""
        return 8 * self.block_bytes / self.block

    def divides(self, columns: int) -> bool:
        """Whether rows of so many values are whole blocks."""
        return columns % self.block == 0


# In the order in which messages list them.
TABLE = (
    QuantType(T.F32, numpy=True, aliases=("FLOAT", "SINGLE", "FULL")),
    QuantType(T.F16, numpy=True, aliases=("HALF",)),
    QuantType(T.BF16, numpy=True, aliases=("HALF", "FULL")),
    QuantType(T.Q4_0, "plain", numpy=True, factors=(0,)),
    QuantType(T.Q4_1, "plain", numpy=True, factors=(0, 2)),
    QuantType(T.Q5_0, "plain", numpy=True, factors=(0,)),
    QuantType(T.Q5_1, "plain", numpy=True, factors=(0, 2)),
    QuantType(T.Q8_0, "plain", numpy=True, factors=(0,), measured=True),
    QuantType(T.Q2_K, "k_mins", fallback=T.Q4_0, factors=(80, 82), measured=True),
    QuantType(T.Q3_K, "k_scales", fallback=T.Q4_0, factors=(108,), measured=True),
    QuantType(T.Q4_K, "k_mins", fallback=T.Q5_0, factors=(0, 2), measured=True),
    QuantType(T.Q5_K, "k_mins", fallback=T.Q5_1, factors=(0, 2), measured=True),
    QuantType(T.Q6_K, "k_scales", fallback=T.Q8_0, factors=(208,), measured=True),
    QuantType(T.IQ1_S, fallback=T.IQ4_NL, imatrix=True, aborts=True, grid=True),
    QuantType(T.IQ1_M, fallback=T.IQ4_NL, imatrix=True, grid=True),
    QuantType(T.IQ2_XXS, "iq2", fallback=T.IQ4_NL, imatrix=True, aborts=True, grid=True, factors=(0,), measured=True),
    QuantType(T.IQ2_XS, "iq2", fallback=T.IQ4_NL, imatrix=True, aborts=True, grid=True, factors=(0,), measured=True),
    QuantType(T.IQ2_S, "iq2", fallback=T.IQ4_NL, imatrix=True, grid=True, factors=(0,), measured=True),
    QuantType(T.IQ3_XXS, "iq3", fallback=T.IQ4_NL, imatrix=True, grid=True, factors=(0,), measured=True),
    QuantType(T.IQ3_S, "iq3", fallback=T.IQ4_NL, grid=True, factors=(0,), measured=True),
    QuantType(T.IQ4_NL, "iq4", factors=(0,)),
    QuantType(T.IQ4_XS, "iq4", fallback=T.IQ4_NL, factors=(0,), measured=True),
    QuantType(T.TQ1_0, numpy=True, fallback=T.Q4_0),
    QuantType(T.TQ2_0, numpy=True, fallback=T.Q4_0),
    QuantType(T.MXFP4, "plain", numpy=True),
)
BY_NAME = {row.name: row for row in TABLE}
_ROWS = {T(number): QuantType(T(number)) for number in GGML_QUANT_SIZES} | {row.ggml_type: row for row in TABLE}


def quant_type(ggml_type: GGMLQuantizationType) -> QuantType:
    """The type's row."""
    return _ROWS[ggml_type]


def row_size(ggml_type: GGMLQuantizationType, columns: int) -> int:
    """Bytes of one row of `columns` values. QuantError if they are no whole number of the type's blocks."""
    row = _ROWS[ggml_type]
    if not row.divides(columns):
        raise QuantError(f"rows of {columns} values do not divide into {row.name} blocks of {row.block}")
    return columns // row.block * row.block_bytes


def bits_per_weight(ggml_type: GGMLQuantizationType) -> float:
    """Bits that a weight takes as this type, factors of its block included."""
    return _ROWS[ggml_type].bpw


def fitting_type(ggml_type: GGMLQuantizationType, columns: int) -> GGMLQuantizationType:
    """The type itself, or what llama-quantize gives rows of `columns` values that its blocks do not divide."""
    if _ROWS[ggml_type].divides(columns):
        return ggml_type
    fallback = _ROWS[ggml_type].fallback or ggml_type
    return fallback if _ROWS[fallback].divides(columns) else F16
