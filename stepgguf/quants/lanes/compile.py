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
from typing import Any

import numba
from numba.core.caching import NullCache
from numba.core.compiler import CompileResult
from numba.core.extending import intrinsic
from numba.core.serialize import dumps

from stepgguf.files import folders

_DIGEST = hashlib.sha256().digest_size


def kernel(function: Callable[..., Any], name: str | None = None) -> Any:
    """Decorator: compile `function` at its first call with each combination of argument types.

    name: what tells it from others in the cache; functions made by the same factory need one.
    """
    dispatcher: Any = numba.njit(nogil=True, error_model="numpy")(function)
    dispatcher._cache = _Cache(name or f"{function.__module__}.{function.__qualname__}")
    return dispatcher


def inlined(function: Callable[..., Any]) -> Any:
    """Decorator: a part of kernels, inlined by LLVM wherever it is called."""
    return numba.njit(nogil=True, error_model="numpy", forceinline=True)(function)


def primitive(build: Callable[..., Any]) -> Any:
    """Decorator: an operation of kernels that is given as LLVM instructions (numba's @intrinsic)."""
    return intrinsic(build)


def is_cached(dispatcher: Any, arguments: tuple[Any, ...]) -> bool:
    """Whether the kernel for arguments like these is in this process or on the disk already."""
    signature = tuple(numba.typeof(argument) for argument in arguments)
    if signature in dispatcher.overloads:
        return True
    file: Path = dispatcher._cache.file(signature, dispatcher.targetctx.codegen())
    return file.exists()


class _Cache(NullCache):
    """What a dispatcher asks before it compiles, and tells afterwards."""

    def __init__(self, name: str) -> None:
        self._name = name

    def file(self, signature: Any, codegen: Any) -> Path:
        key = (
            self._name,
            str(signature),
            codegen.magic_tuple(),
            numba.__version__,
            platform.python_version(),
            _sources(),
        )
        return folders.kernels() / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}.nbc"

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        target_context.refresh()
        try:
            content = self.file(sig, target_context.codegen()).read_bytes()
        except OSError:
            return None
        digest, data = content[:_DIGEST], content[_DIGEST:]
        if hashlib.sha256(data).digest() != digest:
            return None
        return CompileResult._rebuild(target_context, *pickle.loads(data))

    def save_overload(self, sig: Any, data: Any) -> None:
        path = self.file(sig, data.codegen)
        part = path.with_suffix(f".{os.getpid()}")
        content = dumps(data._reduce())
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_bytes(hashlib.sha256(content).digest() + content)
            part.replace(path)
        except OSError:  # a full or read-only disk costs time at the next start, nothing else
            with contextlib.suppress(OSError):
                part.unlink()


@functools.cache
def _sources() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
