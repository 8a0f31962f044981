"""What the blocks of several families share: FP16 factors in their bytes, ggml's weights of their values."""

from __future__ import annotations

from typing import Any

from stepgguf.quants.lanes.compile import inlined
from stepgguf.quants.lanes.rounding import from_half
from stepgguf.quants.lanes.vector import absolute, floats, ints, load, load_bytes, sqrt, store, store_bytes, where


@inlined
def store_half(y: Any, i: int, half: Any) -> None:
    """The low 16 bits of an i32 to bytes i and i + 1, little-endian."""
    store_bytes(y, i, half)
    store_bytes(y, i + 1, half >> ints(8))


@inlined
def load_short(y: Any, i: int) -> Any:
    """The 16 bits in bytes i and i + 1, as i32."""
    return load_bytes(y, i) | (load_bytes(y, i + 1) << ints(8))


@inlined
def load_word(y: Any, i: int) -> Any:
    """The 32 bits in bytes i to i + 3."""
    return load_short(y, i) | (load_short(y, i + 2) << ints(16))


@inlined
def load_half(y: Any, i: int) -> Any:
    """The finite FP16 in bytes i and i + 1, as f32."""
    return from_half(load_short(y, i))


@inlined
def extreme(x: Any, first: int, n: int) -> Any:
    """The first with the largest size of the n values from vector `first` of x on; 0 where none is larger than 0."""
    result = floats(0.0)
    for i in range(first, first + n):
        v = load(x, i)
        result = where(absolute(v) > absolute(result), v, result)
    return result


@inlined
def inverse_or_zero(v: Any) -> Any:
    """1 / v, or 0 for 0."""
    return where(v == floats(0.0), floats(0.0), floats(1.0) / v)


@inlined
def sum_of_squares(x: Any, first: int, n: int) -> Any:
    """Of the n values from vector `first` of x on, added in order."""
    total = floats(0.0)
    for i in range(first, first + n):
        v = load(x, i)
        total = total + v * v
    return total


@inlined
def weigh(x: Any, importance: Any, w: Any, first: int, n: int, sigma2: Any) -> Any:
    """w [n] = importance * sqrt(sigma2 + x^2) for the n values from vector `first` on; returns their sum."""
    total = floats(0.0)
    for i in range(n):
        v = load(x, first + i)
        weight = floats(importance[first + i]) * sqrt(sigma2 + v * v)
        store(w, i, weight)
        total = total + weight
    return total


@inlined
def weigh_or_square(x: Any, importance: Any, w: Any, first: int, n: int, sigma2: Any) -> None:
    """As weigh; without importance, w [n] = x^2."""
    if importance is None:
        for i in range(n):
            v = load(x, first + i)
            store(w, i, v * v)
    else:
        weigh(x, importance, w, first, n, sigma2)
