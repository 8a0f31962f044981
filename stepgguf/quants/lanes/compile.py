"""How a kernel is compiled: once per machine, then from the disk.

no fast-math    each operation rounds as written, in the order written; LLVM contracts nothing into FMA by itself
nogil           threads run kernels in parallel
cache           a file for each kernel in folders.kernels(): sha256 of the rest, then numba's own serialization. Its
                name digests the kernel, its argument types, the processor and all sources of this folder, since
                kernels inline each other. numba's own index per function would let two processes that compile at
                the same time mix up each other's code. What is damaged is compiled again.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import pickle
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

import numba
from numba.core.caching import NullCache
from numba.core.codegen import CPUCodegen
from numba.core.compiler import CompileResult
from numba.core.serialize import dumps
from numba.core.types import Type

from stepgguf.files import folders

P = ParamSpec("P")
R = TypeVar("R")
Signature = tuple[Type, ...]  # numba's types of a call's arguments

_DIGEST_BYTES = hashlib.sha256().digest_size


def kernel(function: Callable[P, R], name: str | None = None) -> Callable[P, R]:
    """Decorator: compile `function` at its first call with each combination of argument types.

    name: what tells it from others in the cache; functions made by the same factory need one.
    """
    dispatcher: Any = numba.njit(nogil=True, error_model="numpy")(function)
    dispatcher._cache = KernelCache(name or f"{function.__module__}.{function.__qualname__}")
    return cast("Callable[P, R]", dispatcher)


def inlined(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: a part of kernels, inlined by LLVM wherever it is called."""
    return cast("Callable[P, R]", numba.njit(nogil=True, error_model="numpy", forceinline=True)(function))


def is_cached(dispatcher: Any, arguments: tuple[object, ...]) -> bool:
    """Whether the kernel (what `kernel` gave) for arguments like these is in this process or on the disk already."""
    signature = tuple(numba.typeof(argument) for argument in arguments)
    if signature in dispatcher.overloads:
        return True
    cache: KernelCache = dispatcher._cache
    return cache.path_of(signature, dispatcher.targetctx.codegen()).exists()


class KernelCache(NullCache):
    """What a dispatcher asks before it compiles, and tells afterwards: numba calls load_ and save_overload."""

    def __init__(self, name: str) -> None:
        self._name = name

    def path_of(self, signature: Signature, codegen: CPUCodegen) -> Path:
        """The file of the kernel for these argument types; it may not be there."""
        key = (
            self._name,
            str(signature),
            codegen.magic_tuple(),  # the processor and its features
            numba.__version__,
            platform.python_version(),
            _sources_digest(),
        )
        return folders.kernels() / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}.nbc"

    def load_overload(self, sig: Signature, target_context: Any) -> Any:
        """The compiled kernel from the disk, or None where it is missing or damaged."""
        target_context.refresh()
        try:
            content = self.path_of(sig, target_context.codegen()).read_bytes()
        except OSError:
            return None
        digest, data = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
        # Unpickling damaged bytes could run anything; a kernel cut short could be machine code that is half there.
        if hashlib.sha256(data).digest() != digest:
            return None
        return CompileResult._rebuild(target_context, *pickle.loads(data))

    def save_overload(self, sig: Signature, data: Any) -> None:
        """Keep a kernel that was just compiled, if the disk can."""
        path = self.path_of(sig, data.codegen)
        part = path.with_suffix(f".{os.getpid()}")  # another process may be writing the same kernel
        content = dumps(data._reduce())
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_bytes(hashlib.sha256(content).digest() + content)
            part.replace(path)
        except OSError:  # a full or read-only disk costs time at the next start, nothing else
            with contextlib.suppress(OSError):
                part.unlink()


@functools.cache
def _sources_digest() -> str:
    """One digest of all files of this folder: kernels inline each other, so a change anywhere may be in any of them."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
