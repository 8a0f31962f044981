"""Lane vectors: LANES numbers that one instruction works on, as values of numba kernels.

    f32     LANES float32           i32     LANES int32           mask    LANES booleans

They are LLVM vector values, so a kernel written with them is SIMD by construction: nothing hopes for LLVM to vectorise
a loop, nothing needs proof that arrays do not overlap. LLVM cuts them into what the processor has: 32 lanes are two
512-bit registers or eight of 128 bits, and the independent halves hide each other's latency.

Arithmetic is IEEE in the order written. Lanes never meet, so no result depends on LANES.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.extending import lower_builtin, models, register_model
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature

from stepgguf.quants.lanes.compile import primitive

# Two vectors of 512 bits where the processor has those, else two of 256 (or four of 128).
LANES = 32 if llvmlite.binding.get_host_cpu_features().get("avx512f") else 16

_FLOAT, _INT, _BYTE, _BIT = ir.FloatType(), ir.IntType(32), ir.IntType(8), ir.IntType(1)


class _Lanes(types.Type):
    """The numba type of a lane vector."""

    def __init__(self, name: str, element: Any) -> None:
        super().__init__(name=f"{name}x{LANES}")
        self.element = element
        self.llvm = ir.VectorType(element, LANES)


F32, I32, MASK = _Lanes("f32", _FLOAT), _Lanes("i32", _INT), _Lanes("mask", _BIT)


@register_model(_Lanes)
class _Model(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: _Lanes) -> None:
        super().__init__(manager, kind, kind.llvm)


# operators ------------------------------------------------------------------------------------------------------

_Build = Callable[..., Any]


def _binary(op: Any, cases: list[tuple[_Lanes, _Lanes, _Build]]) -> None:
    """`op` on two vectors of one kind: [(kind, result, what the IR builder does)]."""
    signatures = [signature(result, kind, kind) for kind, result, _ in cases]
    infer_global(op)(type("Template", (ConcreteTemplate,), {"cases": signatures}))
    for kind, _, build in cases:

        def lower(context: Any, builder: Any, sig: Any, args: Any, build: _Build = build) -> Any:
            return build(builder, *args)

        lower_builtin(op, kind, kind)(lower)


_binary(operator.add, [(F32, F32, ir.IRBuilder.fadd), (I32, I32, ir.IRBuilder.add)])
_binary(operator.sub, [(F32, F32, ir.IRBuilder.fsub), (I32, I32, ir.IRBuilder.sub)])
_binary(operator.mul, [(F32, F32, ir.IRBuilder.fmul), (I32, I32, ir.IRBuilder.mul)])
_binary(operator.truediv, [(F32, F32, ir.IRBuilder.fdiv)])
_binary(operator.and_, [(I32, I32, ir.IRBuilder.and_), (MASK, MASK, ir.IRBuilder.and_)])
_binary(operator.or_, [(I32, I32, ir.IRBuilder.or_), (MASK, MASK, ir.IRBuilder.or_)])
_binary(operator.xor, [(I32, I32, ir.IRBuilder.xor), (MASK, MASK, ir.IRBuilder.xor)])
_binary(operator.lshift, [(I32, I32, ir.IRBuilder.shl)])
_binary(operator.rshift, [(I32, I32, ir.IRBuilder.lshr)])  # bits, not numbers: zeros come in


def _compare(sign: str) -> list[tuple[_Lanes, _Lanes, _Build]]:
    ordered = "fcmp_unordered" if sign == "!=" else "fcmp_ordered"  # C's meaning for NaN
    return [
        (F32, MASK, lambda builder, a, b: getattr(builder, ordered)(sign, a, b)),
        (I32, MASK, lambda builder, a, b: builder.icmp_signed(sign, a, b)),
    ]


for _op, _sign in ((operator.lt, "<"), (operator.le, "<="), (operator.gt, ">"), (operator.ge, ">="),
                   (operator.eq, "=="), (operator.ne, "!=")):  # fmt: skip
    _binary(_op, _compare(_sign))


# making, loading, storing ---------------------------------------------------------------------------------------


def _splat(builder: Any, kind: _Lanes, scalar: Any) -> Any:
    one = builder.insert_element(ir.Constant(kind.llvm, ir.Undefined), scalar, _INT(0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(_INT, LANES), [0] * LANES))


@primitive
def floats(typing: Any, x: Any) -> Any:
    """The float x, rounded to float32, in each lane."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _splat(builder, F32, context.cast(builder, args[0], sig.args[0], types.float32))

    return F32(x), build


@primitive
def ints(typing: Any, x: Any) -> Any:
    """The integer x in each lane."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _splat(builder, I32, context.cast(builder, args[0], sig.args[0], types.int32))

    return I32(x), build


def _address(context: Any, builder: Any, sig: Any, args: Any, element: Any) -> Any:
    """Pointer to vector number args[1] of the contiguous array args[0]."""
    array = context.make_array(sig.args[0])(context, builder, args[0])
    index = context.cast(builder, args[1], sig.args[1], types.intp)
    first = builder.mul(index, ir.Constant(index.type, LANES))
    pointer = builder.gep(array.data, [first])
    return builder.bitcast(pointer, ir.VectorType(element, LANES).as_pointer())


@primitive
def load(typing: Any, array: Any, i: Any) -> Any:
    """Vector number i of a contiguous array of float32 or int32."""
    kind = F32 if array.dtype == types.float32 else I32

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.load(_address(context, builder, sig, args, kind.element), align=4)

    return kind(array, i), build


@primitive
def load_bytes(typing: Any, array: Any, i: Any) -> Any:
    """Vector number i of a contiguous array of uint8, as i32."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.zext(builder.load(_address(context, builder, sig, args, _BYTE), align=1), I32.llvm)

    return I32(array, i), build


@primitive
def store(typing: Any, array: Any, i: Any, value: Any) -> Any:
    """Put a vector at place i of a contiguous array of float32 or int32."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.store(args[2], _address(context, builder, sig, args, value.element), align=4)
        return context.get_dummy_value()

    return types.void(array, i, value), build


@primitive
def store_bytes(typing: Any, array: Any, i: Any, value: Any) -> Any:
    """Put the low bytes of an i32 at place i of a contiguous array of uint8."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        narrow = builder.trunc(args[2], ir.VectorType(_BYTE, LANES))
        builder.store(narrow, _address(context, builder, sig, args, _BYTE), align=1)
        return context.get_dummy_value()

    return types.void(array, i, value), build


# functions ------------------------------------------------------------------------------------------------------


@primitive
def where(typing: Any, mask: Any, a: Any, b: Any) -> Any:
    """a where the mask is true, else b."""
    return a(mask, a, b), lambda context, builder, sig, args: builder.select(*args)


@primitive
def bits(typing: Any, x: Any) -> Any:
    """The bits of an f32 as i32, or of an i32 as f32."""
    to = I32 if x is F32 else F32
    return to(x), lambda context, builder, sig, args: builder.bitcast(args[0], to.llvm)


@primitive
def to_float(typing: Any, x: Any) -> Any:
    """The numbers of an i32 as f32, rounded to nearest."""
    return F32(I32), lambda context, builder, sig, args: builder.sitofp(args[0], F32.llvm)


@primitive
def to_int(typing: Any, x: Any) -> Any:
    """The numbers of an f32 as i32, rounded toward zero; what does not fit, or is NaN, becomes -2^31 as on x86."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        limit = ir.Constant(F32.llvm, [2.0**31] * LANES)
        size = builder.call(_intrinsic(builder, "fabs"), args)
        fits = builder.fcmp_ordered("<", size, limit)
        return builder.select(fits, builder.fptosi(args[0], I32.llvm), ir.Constant(I32.llvm, [-(2**31)] * LANES))

    return I32(F32), build


def _intrinsic(builder: Any, name: str) -> Any:
    kind = ir.FunctionType(F32.llvm, [F32.llvm])
    return cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}.v{LANES}f32")


def _unary(name: str) -> Any:
    return F32(F32), lambda context, builder, sig, args: builder.call(_intrinsic(builder, name), args)


@primitive
def sqrt(typing: Any, x: Any) -> Any:
    """Square root, correctly rounded."""
    return _unary("sqrt")


@primitive
def absolute(typing: Any, x: Any) -> Any:
    """fabsf."""
    return _unary("fabs")


@primitive
def any_lane(typing: Any, mask: Any) -> Any:
    """Whether the mask is true in any lane, as a boolean."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        whole = builder.bitcast(args[0], ir.IntType(LANES))
        return builder.icmp_unsigned("!=", whole, ir.Constant(whole.type, 0))

    return types.boolean(MASK), build


@primitive
def gather(typing: Any, table: Any, index: Any) -> Any:
    """table[index] in each lane, of a flat array of float32 or int32. Every index must lie inside."""
    kind = F32 if table.dtype == types.float32 else I32

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        data = context.make_array(sig.args[0])(context, builder, args[0]).data
        result = ir.Constant(kind.llvm, ir.Undefined)
        for lane in range(LANES):
            place = builder.sext(builder.extract_element(args[1], _INT(lane)), ir.IntType(64))
            result = builder.insert_element(result, builder.load(builder.gep(data, [place])), _INT(lane))
        return result

    return kind(table, I32), build
