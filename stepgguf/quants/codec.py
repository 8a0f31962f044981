"""quantize and dequantize: one call each, whatever the type.

ggml's own code does the work where its library is installed; otherwise gguf-py's numpy code, which gives the same
bytes for the types that it can encode (tests/quants/test_codec.py compares them).
"""

from __future__ import annotations

import gguf.quants
import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from stepgguf.errors import QuantError
from stepgguf.quants import ggml
from stepgguf.quants.ggml import BF16, F16, F32

_NUMPY_ENCODERS = frozenset(
    GGMLQuantizationType[name]
    for name in ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4")
)


def check_encoder(kind: GGMLQuantizationType, *, has_imatrix: bool = False) -> None:
    """Raise QuantError now if `quantize` could not encode this type here."""
    if kind in ggml.ABORT_WITHOUT_IMATRIX and not has_imatrix:
        raise QuantError(f"{kind.name} cannot be encoded without an importance matrix")
    library = ggml.load()
    if library is not None:
        library.prepare(kind)
    elif kind not in _NUMPY_ENCODERS:
        raise QuantError(
            f"{kind.name} is encoded by ggml's library, which is not installed",
            hint="Install it with: pip install 'stepgguf[run]' (it ships with llama-cpp-python).",
        )


def quantize(
    kind: GGMLQuantizationType,
    rows: NDArray[np.float32],
    out: NDArray[np.uint8],
    importance: NDArray[np.float32] | None = None,
) -> None:
    """Encode float32 rows [n, columns] into out [n, row_size]. importance: [columns]. Call `check_encoder` first."""
    if kind == F32:
        out.view(np.float32)[:] = rows
        return
    library = ggml.load()
    if library is not None:
        library.quantize(kind, rows, out, importance)
    else:
        out[:] = gguf.quants.quantize(rows, kind).view(np.uint8).reshape(out.shape)


def dequantize(kind: GGMLQuantizationType, data: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
    """Decode data [n, row bytes] into out [n, columns], float32."""
    library = ggml.load()
    if kind == F32:
        out[:] = data.view(np.float32).reshape(out.shape)
    elif library is not None and library.can_dequantize(kind):
        library.dequantize(kind, data, out)
    elif kind == BF16:
        np.left_shift(data.view(np.uint16).reshape(out.shape), 16, out=out.view(np.uint32), dtype=np.uint32)
    elif kind == F16:
        out[:] = data.view(np.float16).reshape(out.shape)
    else:
        out[:] = gguf.quants.dequantize(data, kind).reshape(out.shape)
