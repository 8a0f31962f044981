"""The only ctypes on ggml: its own encoders and decoders, from the library that llama-cpp-python ships.

ctypes releases the GIL around each call, and the calls are thread-safe, so a thread pool runs them in parallel. The
library is found on disk without importing llama_cpp. Where it is not installed, `load_library` returns None and
kernels.py falls back on gguf-py's numpy encoders for the types that those know.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from stepgguf.errors import QuantError
from stepgguf.quants.types import BF16, F16, quant_type

# From this size of values on, ggml finds no point of a grid the closest and aborts (types.QuantType.grid). No FP16
# scale reaches a hundredth of it.
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
            ggml_type: function
            for ggml_type, symbol in _decoders().items()
            if (function := _void_function(library, symbol)) is not None
        }

    def quantize(
        self,
        ggml_type: GGMLQuantizationType,
        rows: NDArray[np.float32],
        out: NDArray[np.uint8],
        importance: NDArray[np.float32] | None = None,
    ) -> None:
        """Encode float32 rows [n, columns] into out [n, row bytes], as llama-quantize does. importance: [columns]."""
        n, columns = rows.shape
        # Without, ggml would end the process: kernels.choose_kernel refuses such a type before it gets here.
        assert importance is not None or not quant_type(ggml_type).aborts
        assert importance is None or (importance.dtype == np.float32 and importance.shape == (columns,))
        assert rows.flags.c_contiguous
        assert out.flags.c_contiguous
        weights = None if importance is None else np.ascontiguousarray(importance)
        pointer = None if weights is None else weights.ctypes.data
        written = self._quantize(int(ggml_type), rows.ctypes.data, out.ctypes.data, 0, n, columns, pointer)
        if written != out.nbytes or not self._validate(int(ggml_type), out.ctypes.data, out.nbytes):
            raise QuantError(f"ggml could not encode {n} rows of {columns} values as {ggml_type.name}")

    def prepare(self, ggml_type: GGMLQuantizationType) -> None:
        """Build the type's lookup tables now, on one thread."""
        self._init(int(ggml_type))

    def dequantize(self, ggml_type: GGMLQuantizationType, data: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
        """Decode data into as many float32 values as out holds."""
        assert data.flags.c_contiguous
        assert out.flags.c_contiguous
        self._to_float[ggml_type](data.ctypes.data, out.ctypes.data, out.size)


def _decoders() -> dict[GGMLQuantizationType, str]:
    names = {
        ggml_type: f"dequantize_row_{ggml_type.name.lower().replace('_k', '_K')}" for ggml_type in GGMLQuantizationType
    }
    return names | {F16: "ggml_fp16_to_fp32_row", BF16: "ggml_bf16_to_fp32_row"}


def _void_function(library: ctypes.CDLL, symbol: str) -> Any:
    function = getattr(library, symbol, None)
    if function is not None:
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
        function.restype = None
    return function


@functools.cache
def load_library() -> Ggml | None:
    """ggml from the installed llama-cpp-python, or None."""
    spec = importlib.util.find_spec("llama_cpp")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for name in _NAMES:
            path = Path(folder) / "lib" / name
            if path.exists():
                return Ggml(path)
    return None
