"""The only ctypes on ggml: its own encoders and decoders, from the library that llama-cpp-python ships.

ctypes releases the GIL around each call, and the calls are thread-safe, so a thread pool runs them in parallel. The
library is found on disk without importing llama_cpp. Where it is not installed, `load` returns None and codec.py
falls back on gguf-py's numpy encoders for the types that those know.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from stepgguf.errors import QuantError

F32, F16, BF16 = GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16

# ggml aborts the whole process when it is asked for one of these without an importance matrix (ggml.c,
# ggml_quantize_requires_imatrix). codec.quantize refuses them before they get here.
ABORT_WITHOUT_IMATRIX = frozenset(
    {GGMLQuantizationType.IQ2_XXS, GGMLQuantizationType.IQ2_XS, GGMLQuantizationType.IQ1_S}
)

# And where values are so large that no point of a grid is the closest. No FP16 scale reaches a hundredth of this.
GRIDS = frozenset(kind for kind in GGMLQuantizationType if kind.name.startswith(("IQ1_", "IQ2_", "IQ3_")))
ABORT_FROM = 2.0**32

_NAMES = ("libggml-base.so", "libggml-base.dylib", "ggml-base.dll")


class Ggml:
    """libggml-base. Pointers are to C-contiguous arrays that the caller keeps alive during the call."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        self.path = path
        self._quantize = library.ggml_quantize_chunk
        self._quantize.argtypes = [
            ctypes.c_int,
            ctypes.c_void_p,
            ctypes.c_void_p,
            *[ctypes.c_int64] * 3,
            ctypes.c_void_p,
        ]
        self._quantize.restype = ctypes.c_size_t
        self._validate = library.ggml_validate_row_data
        self._validate.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
        self._validate.restype = ctypes.c_bool
        library.ggml_quantize_init.argtypes = [ctypes.c_int]
        library.ggml_quantize_init.restype = None
        self._init = library.ggml_quantize_init
        self._to_float = {
            kind: function
            for kind, symbol in _decoders().items()
            if (function := _void_function(library, symbol)) is not None
        }

    def quantize(
        self,
        kind: GGMLQuantizationType,
        rows: NDArray[np.float32],
        out: NDArray[np.uint8],
        importance: NDArray[np.float32] | None = None,
    ) -> None:
        """Encode float32 rows [n, columns] into out [n, row bytes], as llama-quantize does. importance: [columns]."""
        n, columns = rows.shape
        assert importance is not None or kind not in ABORT_WITHOUT_IMATRIX
        assert importance is None or (importance.dtype == np.float32 and importance.shape == (columns,))
        assert rows.flags.c_contiguous
        assert out.flags.c_contiguous
        weights = None if importance is None else np.ascontiguousarray(importance)
        pointer = None if weights is None else weights.ctypes.data
        written = self._quantize(int(kind), rows.ctypes.data, out.ctypes.data, 0, n, columns, pointer)
        if written != out.nbytes or not self._validate(int(kind), out.ctypes.data, out.nbytes):
            raise QuantError(f"ggml could not encode {n} rows of {columns} values as {kind.name}")

    def prepare(self, kind: GGMLQuantizationType) -> None:
        """Build the type's lookup tables now, on one thread."""
        self._init(int(kind))

    def dequantize(self, kind: GGMLQuantizationType, data: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
        """Decode data into as many float32 values as out holds."""
        assert data.flags.c_contiguous
        assert out.flags.c_contiguous
        self._to_float[kind](data.ctypes.data, out.ctypes.data, out.size)


def _decoders() -> dict[GGMLQuantizationType, str]:
    names = {kind: f"dequantize_row_{kind.name.lower().replace('_k', '_K')}" for kind in GGMLQuantizationType}
    return names | {F16: "ggml_fp16_to_fp32_row", BF16: "ggml_bf16_to_fp32_row"}


def _void_function(library: ctypes.CDLL, symbol: str) -> Any:
    function = getattr(library, symbol, None)
    if function is not None:
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
        function.restype = None
    return function


@functools.cache
def load() -> Ggml | None:
    """ggml from the installed llama-cpp-python, or None."""
    spec = importlib.util.find_spec("llama_cpp")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for name in _NAMES:
            path = Path(folder) / "lib" / name
            if path.exists():
                return Ggml(path)
    return None


def row_size(kind: GGMLQuantizationType, columns: int) -> int:
    """Bytes of one row. `columns` must be a multiple of the type's block size."""
    block, size = GGML_QUANT_SIZES[kind]
    if columns % block:
        raise QuantError(f"rows of {columns} values do not divide into {kind.name} blocks of {block}")
    return columns // block * size
