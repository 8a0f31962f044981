"""How a kernel is compiled: once per machine, then from the disk.

    no fast-math    each operation rounds as written, in the order written; LLVM contracts nothing into FMA by itself
    nogil           threads run kernels in parallel
    cache           beside the source, or in the user's cache where that is not writable; a kernel's entry is void as
                    soon as any file of this folder changes, since kernels inline each other
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from numba.core.caching import FunctionCache


def kernel(function: Callable[..., Any]) -> Any:
    """Decorator: compile `function` at its first call with each combination of argument types."""
    dispatcher: Any = numba.njit(nogil=True, error_model="numpy")(function)
    dispatcher._cache = _FolderCache(function)  # type: ignore[no-untyped-call]
    return dispatcher


def inlined(function: Callable[..., Any]) -> Any:
    """Decorator: a part of kernels, inlined by LLVM wherever it is called."""
    return numba.njit(nogil=True, error_model="numpy", forceinline=True)(function)


class _FolderCache(FunctionCache):
    def _index_key(self, sig: Any, codegen: Any) -> Any:
        return (*super()._index_key(sig, codegen), _folder_digest())  # type: ignore[no-untyped-call]


@functools.cache
def _folder_digest() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
