"""Lane vectors: LANES numbers that one instruction works on, as values of numba kernels.

    f32     LANES float32           i32     LANES int32           mask    LANES booleans

They are LLVM vector values, so a kernel written with them is SIMD by construction: nothing hopes for LLVM to vectorise
a loop, nothing needs proof that arrays do not overlap. LLVM cuts them into what the processor has: 32 lanes are two
512-bit registers or eight of 128 bits, and the independent halves hide each other's latency.

Arithmetic is IEEE in the order written. Lanes never meet, so no result depends on LANES.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.core.base import BaseContext
from numba.core.datamodel.manager import DataModelManager
from numba.core.extending import lower_builtin, models, register_model
from numba.core.typing.templates import ConcreteTemplate, Signature, infer_global, signature
from numpy.typing import NDArray

from stepgguf.quants.lanes.compile import inlined
from stepgguf.quants.lanes.operands import ByteTile, F32Lanes, F32Tile, I32Lanes, I32Tile, Lanes, Mask, Number
from stepgguf.quants.lanes.primitive import (
    BIT,
    BYTE,
    FLOAT,
    INT,
    Call,
    LlvmValue,
    Lowering,
    broadcast,
    call_llvm,
    primitive,
    repeated,
    vector_of,
    vector_pointer,
)

# Two vectors of 512 bits where the processor has those, else two of 256 (or four of 128).
LANES = 32 if llvmlite.binding.get_host_cpu_features().get("avx512f") else 16


class LanesType(types.Type):
    """numba's type of a lane vector; operands.Lanes is the same for mypy."""

    def __init__(self, name: str, element: ir.Type) -> None:
        super().__init__(name=f"{name}x{LANES}")
        self.llvm = vector_of(element, LANES)


F32, I32, MASK = LanesType("f32", FLOAT), LanesType("i32", INT), LanesType("mask", BIT)


@register_model(LanesType)
class LanesModel(models.PrimitiveModel):
    """How numba holds a lane vector: as LLVM's value, in registers."""

    def __init__(self, manager: DataModelManager, lanes: LanesType) -> None:
        super().__init__(manager, lanes, lanes.llvm)


# operators ------------------------------------------------------------------------------------------------------

Build = Callable[[ir.IRBuilder, LlvmValue, LlvmValue], LlvmValue]


def _define_operator(operation: Callable[[Any, Any], Any], cases: list[tuple[LanesType, LanesType, Build]]) -> None:
    """Teach numba an operator on two vectors of one type; a case is (their type, the result's, its instruction)."""
    signatures = [signature(result, operand, operand) for operand, result, _ in cases]
    infer_global(operation)(type("Template", (ConcreteTemplate,), {"cases": signatures}))
    for operand, _, build in cases:

        def lower(
            context: BaseContext, builder: ir.IRBuilder, sig: Signature, args: Sequence[LlvmValue], build: Build = build
        ) -> LlvmValue:
            return build(builder, *args)

        lower_builtin(operation, operand, operand)(lower)


_define_operator(operator.add, [(F32, F32, ir.IRBuilder.fadd), (I32, I32, ir.IRBuilder.add)])
_define_operator(operator.sub, [(F32, F32, ir.IRBuilder.fsub), (I32, I32, ir.IRBuilder.sub)])
_define_operator(operator.mul, [(F32, F32, ir.IRBuilder.fmul), (I32, I32, ir.IRBuilder.mul)])
_define_operator(operator.truediv, [(F32, F32, ir.IRBuilder.fdiv)])
_define_operator(operator.and_, [(I32, I32, ir.IRBuilder.and_), (MASK, MASK, ir.IRBuilder.and_)])
_define_operator(operator.or_, [(I32, I32, ir.IRBuilder.or_), (MASK, MASK, ir.IRBuilder.or_)])
_define_operator(operator.xor, [(I32, I32, ir.IRBuilder.xor), (MASK, MASK, ir.IRBuilder.xor)])
_define_operator(operator.lshift, [(I32, I32, ir.IRBuilder.shl)])
# Bits, not numbers: zeros come in from above, so a word's highest field needs no mask.
_define_operator(operator.rshift, [(I32, I32, ir.IRBuilder.lshr)])


def _comparisons(sign: str) -> list[tuple[LanesType, LanesType, Build]]:
    """The cases of a comparison operator, `sign` as C writes it."""
    # C's meaning for NaN: it is unequal to everything, and no other comparison with it is true.
    compare_floats = "fcmp_unordered" if sign == "!=" else "fcmp_ordered"
    return [
        (F32, MASK, lambda builder, a, b: getattr(builder, compare_floats)(sign, a, b)),
        (I32, MASK, lambda builder, a, b: builder.icmp_signed(sign, a, b)),
    ]


for _operation, _sign in ((operator.lt, "<"), (operator.le, "<="), (operator.gt, ">"), (operator.ge, ">="),
                          (operator.eq, "=="), (operator.ne, "!=")):  # fmt: skip
    _define_operator(_operation, _comparisons(_sign))


# making, loading, storing ---------------------------------------------------------------------------------------


@inlined
def f32_tile(n: int) -> F32Tile:
    """Room for n float32 vectors, with no value yet."""
    return np.empty(n * LANES, np.float32)


@inlined
def i32_tile(n: int) -> I32Tile:
    """Room for n int32 vectors, with no value yet."""
    return np.empty(n * LANES, np.int32)


@inlined
def byte_tile(n: int) -> ByteTile:
    """Room for n vectors of bytes, with no value yet."""
    return np.empty(n * LANES, np.uint8)


@primitive
def floats(x: float) -> Lowering[F32Lanes]:
    """The float x, rounded to float32, in each lane."""

    def emit(call: Call) -> LlvmValue:
        scalar = call.context.cast(call.builder, call.arguments[0], call.argument_types[0], types.float32)
        return broadcast(call.builder, scalar, LANES)

    return Lowering(F32, emit)


@primitive
def ints(x: int) -> Lowering[I32Lanes]:
    """The integer x in each lane."""

    def emit(call: Call) -> LlvmValue:
        scalar = call.context.cast(call.builder, call.arguments[0], call.argument_types[0], types.int32)
        return broadcast(call.builder, scalar, LANES)

    return Lowering(I32, emit)


def _lanes_of(array: Any) -> LanesType:
    """The type of the vectors in an array; `array` is numba's type of it."""
    return F32 if array.dtype == types.float32 else I32


def _address(call: Call, element: ir.Type) -> LlvmValue:
    """The address of vector number `argument 1` of the array that is argument 0."""
    index = call.index(1)
    first = call.builder.mul(index, ir.Constant(index.type, LANES))
    return vector_pointer(call.builder, call.pointer(0), first, vector_of(element, LANES))


@primitive
def load(array: NDArray[Number], i: int) -> Lowering[Lanes[Number]]:
    """Vector number i of a contiguous array of float32 or int32."""
    lanes = _lanes_of(array)
    # align=4: a tile begins where numpy puts an array, which is no vector's natural alignment.
    return Lowering(lanes, lambda call: call.builder.load(_address(call, lanes.llvm.element), align=4))


@primitive
def load_bytes(array: ByteTile, i: int) -> Lowering[I32Lanes]:
    """Vector number i of a contiguous array of uint8, each byte widened to a number from 0 to 255."""
    return Lowering(I32, lambda call: call.builder.zext(call.builder.load(_address(call, BYTE), align=1), I32.llvm))


@primitive
def store(array: NDArray[Number], i: int, value: Lanes[Number]) -> Lowering[None]:
    """Put a vector at place i of a contiguous array of float32 or int32."""
    element = _lanes_of(array).llvm.element

    def emit(call: Call) -> LlvmValue:
        call.builder.store(call.arguments[2], _address(call, element), align=4)
        return call.nothing()

    return Lowering(types.void, emit)


@primitive
def store_bytes(array: ByteTile, i: int, value: I32Lanes) -> Lowering[None]:
    """Put the low bytes of an i32 at place i of a contiguous array of uint8; what is above bit 7 is dropped."""

    def emit(call: Call) -> LlvmValue:
        narrow = call.builder.trunc(call.arguments[2], vector_of(BYTE, LANES))
        call.builder.store(narrow, _address(call, BYTE), align=1)
        return call.nothing()

    return Lowering(types.void, emit)


# functions ------------------------------------------------------------------------------------------------------


@primitive
def where(mask: Mask, a: Lanes[Number], b: Lanes[Number]) -> Lowering[Lanes[Number]]:
    """a where the mask is true, else b. Both are computed: there is no branch, a division by 0 in one is harmless."""
    return Lowering(_numba_type(a), lambda call: call.builder.select(*call.arguments))


def _numba_type(argument: Any) -> types.Type:
    """The argument of a primitive while it is compiled: numba's type of what its annotation says."""
    assert isinstance(argument, types.Type)
    return argument


@primitive
def bits_of(x: F32Lanes) -> Lowering[I32Lanes]:
    """The bits of float32 numbers: sign at 31, 8 bits of exponent from 23 on, 23 of fraction."""
    return Lowering(I32, lambda call: call.builder.bitcast(call.arguments[0], I32.llvm))


@primitive
def float_of_bits(x: I32Lanes) -> Lowering[F32Lanes]:
    """The float32 numbers that have these bits."""
    return Lowering(F32, lambda call: call.builder.bitcast(call.arguments[0], F32.llvm))


@primitive
def to_float(x: I32Lanes) -> Lowering[F32Lanes]:
    """The numbers of an i32 as f32, rounded to nearest."""
    return Lowering(F32, lambda call: call.builder.sitofp(call.arguments[0], F32.llvm))


@primitive
def to_int(x: F32Lanes) -> Lowering[I32Lanes]:
    """The numbers of an f32 as i32, rounded toward zero; what does not fit, or is NaN, becomes -2^31 as on x86."""

    def emit(call: Call) -> LlvmValue:
        builder, x = call.builder, call.arguments[0]
        size = call_llvm(builder, f"llvm.fabs.v{LANES}f32", F32.llvm, x)
        fits = builder.fcmp_ordered("<", size, repeated(F32.llvm, 2.0**31))
        # LLVM leaves fptosi undefined for the others, so select must not let it through.
        return builder.select(fits, builder.fptosi(x, I32.llvm), repeated(I32.llvm, -(2**31)))

    return Lowering(I32, emit)


@primitive
def sqrt(x: F32Lanes) -> Lowering[F32Lanes]:
    """The square root, correctly rounded."""
    return Lowering(F32, lambda call: call_llvm(call.builder, f"llvm.sqrt.v{LANES}f32", F32.llvm, *call.arguments))


@primitive
def absolute(x: F32Lanes) -> Lowering[F32Lanes]:
    """The number without its sign (C's fabsf)."""
    return Lowering(F32, lambda call: call_llvm(call.builder, f"llvm.fabs.v{LANES}f32", F32.llvm, *call.arguments))


@primitive
def any_lane(mask: Mask) -> Lowering[bool]:
    """Whether the mask is true in any lane, as a boolean that kernels can branch on."""

    def emit(call: Call) -> LlvmValue:
        whole = call.builder.bitcast(call.arguments[0], ir.IntType(LANES))
        return call.builder.icmp_unsigned("!=", whole, ir.Constant(whole.type, 0))

    return Lowering(types.boolean, emit)


@primitive
def gather(table: NDArray[Number], index: I32Lanes) -> Lowering[Lanes[Number]]:
    """table[index] in each lane, of a flat array of float32 or int32. Every index must lie inside: nothing checks."""
    lanes = _lanes_of(table)

    def emit(call: Call) -> LlvmValue:
        builder, data = call.builder, call.pointer(0)
        result = ir.Constant(lanes.llvm, ir.Undefined)
        for lane in range(LANES):
            place = builder.sext(builder.extract_element(call.arguments[1], INT(lane)), ir.IntType(64))
            result = builder.insert_element(result, builder.load(builder.gep(data, [place])), INT(lane))
        return result

    return Lowering(lanes, emit)
