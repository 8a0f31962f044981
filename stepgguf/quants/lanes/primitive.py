"""Primitives: operations of kernels that are given as LLVM instructions, and the instructions that they share.

A primitive is declared with the types of a call in a kernel; its body runs when such a call is compiled. There its
arguments are numba's types of what the annotations say, and it gives the result's type and what emits instructions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec, TypeAlias, TypeVar, cast

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.base import BaseContext
from numba.core.extending import intrinsic
from numba.core.typing.templates import Signature

P = ParamSpec("P")
R = TypeVar("R")

# An LLVM value: what an instruction gives, an argument or a constant. llvmlite has no class of all that have a type.
LlvmValue: TypeAlias = Any

FLOAT, INT, SHORT, BYTE, BIT = ir.FloatType(), ir.IntType(32), ir.IntType(16), ir.IntType(8), ir.IntType(1)


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a primitive as it is compiled: where instructions go, and its arguments."""

    context: BaseContext
    builder: ir.IRBuilder
    argument_types: tuple[types.Type, ...]
    arguments: Sequence[LlvmValue]

    def pointer(self, i: int) -> LlvmValue:
        """The address of the first element of argument i, a contiguous array."""
        return self.context.make_array(self.argument_types[i])(self.context, self.builder, self.arguments[i]).data

    def index(self, i: int) -> LlvmValue:
        """Argument i, an integer of any width, as wide as a pointer."""
        return self.context.cast(self.builder, self.arguments[i], self.argument_types[i], types.intp)

    def element(self, i: int) -> Any:
        """numba's type of the elements of argument i, an array: one of types.Number, whose bits it knows."""
        array = self.argument_types[i]
        assert isinstance(array, types.Array)
        return array.dtype

    def nothing(self) -> LlvmValue:
        """The result of a primitive that returns None."""
        return self.context.get_dummy_value()


Emit = Callable[[Call], LlvmValue]


@dataclass(frozen=True, slots=True)
class Lowering(Generic[R]):
    """What a call of a primitive becomes: `result` is numba's type of the R that it gives, `emit` its instructions."""

    result: types.Type
    emit: Emit


def primitive(declare: Callable[P, Lowering[R]]) -> Callable[P, R]:
    """Decorator: an operation of kernels that is given as LLVM instructions (a numba intrinsic)."""

    def typed(context: object, *arguments: types.Type) -> tuple[Signature, Callable[..., LlvmValue]]:
        lowering = declare(*arguments)  # type: ignore[call-arg, arg-type]

        def lower(context: BaseContext, builder: ir.IRBuilder, signature: Signature, values: Any) -> LlvmValue:
            return lowering.emit(Call(context, builder, signature.args, values))

        return lowering.result(*arguments), lower

    # numba matches a call's arguments with the names that it finds here; the first is its own.
    own = inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    named = inspect.signature(declare)
    typed.__signature__ = named.replace(parameters=[own, *named.parameters.values()])  # type: ignore[attr-defined]
    typed.__name__, typed.__doc__ = declare.__name__, declare.__doc__
    return cast("Callable[P, R]", intrinsic(typed))


# instructions that several primitives need -----------------------------------------------------------------------


def vector_of(element: ir.Type, n: int) -> ir.VectorType:
    """LLVM's type of n elements in a register."""
    return ir.VectorType(element, n)


def repeated(vector: ir.VectorType, number: float) -> ir.Constant:
    """The constant of a vector type that holds the number in each place."""
    return ir.Constant(vector, [number] * vector.count)


def broadcast(builder: ir.IRBuilder, scalar: LlvmValue, n: int) -> LlvmValue:
    """The scalar in each of n places."""
    one = builder.insert_element(ir.Constant(vector_of(scalar.type, n), ir.Undefined), scalar, INT(0))
    return builder.shuffle_vector(one, one, repeated(vector_of(INT, n), 0))


def vector_pointer(builder: ir.IRBuilder, data: LlvmValue, place: LlvmValue, vector: ir.VectorType) -> LlvmValue:
    """The address of a vector whose first element is data[place]."""
    return builder.bitcast(builder.gep(data, [place]), vector.as_pointer())


def call_llvm(builder: ir.IRBuilder, name: str, result: ir.Type, *arguments: LlvmValue) -> LlvmValue:
    """A call of LLVM's own function of that name, e.g. llvm.vector.reduce.smax.v16i32."""
    function = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, function, name), arguments)
