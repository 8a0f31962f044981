"""llama.cpp as the oracle: llama_model_quantize of the installed llama-cpp-python, and ggml's own functions.

Their bytes are ours on x86-64. Elsewhere ggml's build contracts sums into FMA, and tests of identity are skipped.
"""

from __future__ import annotations

import ctypes
import platform
import re
from collections.abc import Mapping
from pathlib import Path

import llama_cpp
import numpy as np
import numpy.typing as npt
import pytest

from stepgguf.quants import ggml, mixtures


def library() -> ggml.Ggml:
    """ggml, where its bytes are ours."""
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("ggml's build for this processor rounds otherwise")
    found = ggml.load_library()
    assert found is not None
    return found


def llama_quantize(
    source: Path,
    dest: Path,
    type_name: str,
    *,
    dry_run: bool = False,
    requantize: bool = False,
    imatrix: Mapping[str, npt.NDArray[np.float32]] | None = None,
) -> str:
    """Run llama-quantize's function and return what it logged.

    imatrix: GGUF tensor name -> [n_expert, columns], already divided by the counts; the tool does that before the call.
    """
    library()
    lines: list[str] = []

    def log(level: int, text: bytes, data: object) -> None:
        lines.append(text.decode(errors="replace"))

    callback = llama_cpp.llama_log_callback(log)
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = int(mixtures.file_type(type_name))
    params.dry_run = dry_run
    params.allow_requantize = requantize
    weights = _imatrix_data(imatrix or {})
    if imatrix is not None:
        params.imatrix = weights
    try:
        code = llama_cpp.llama_model_quantize(str(source).encode(), str(dest).encode(), ctypes.byref(params))
    finally:
        silence()
    text = "".join(lines)
    if code != 0:
        raise RuntimeError(text[-2000:])
    return text


def _imatrix_data(imatrix: Mapping[str, npt.NDArray[np.float32]]) -> ctypes.Array[ctypes.Structure]:
    """llama_model_imatrix_data structs, ended by one without a name. They point into the arrays."""
    data = (llama_cpp.llama_model_imatrix_data * (len(imatrix) + 1))()
    for item, (name, values) in zip(data, imatrix.items(), strict=False):
        assert values.dtype == np.float32
        assert values.flags.c_contiguous
        item.name = name.encode()
        item.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        item.size = values.size
    return data


def chosen_types(log: str) -> dict[str, str]:
    """Tensor name -> type, from what a dry run logs."""
    types = {}
    for line in re.findall(r"\[ *\d+/ *\d+\] .*", log):
        name = line.split("]", 1)[1].split()[0]
        last = re.search(r"MiB \((\w+)\)", line)
        types[name] = (last[1] if last else re.search(r"type = +(\w+)", line)[1]).upper()  # type: ignore[index]
    return types


def silence() -> None:
    """No messages: llama-cpp-python's own printer fails on tokens that llama.cpp cuts in mid-character."""
    llama_cpp.llama_log_set(_SILENT, ctypes.c_void_p(0))


@llama_cpp.llama_log_callback
def _SILENT(level: int, text: bytes, data: object) -> None:  # noqa: N802
    pass
