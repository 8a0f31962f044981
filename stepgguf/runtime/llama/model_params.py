"""llama_model_params for a placement: which tensor goes where, as llama.cpp's loader is told."""

from __future__ import annotations

import ctypes

import llama_cpp

from stepgguf.errors import ModelLoadFailed
from stepgguf.runtime.llama_build import buffer_types, probe_build
from stepgguf.runtime.placement import ALL_LAYERS, Placement

_SPLIT_MODES = {
    "none": llama_cpp.LLAMA_SPLIT_MODE_NONE,
    "layer": llama_cpp.LLAMA_SPLIT_MODE_LAYER,
    "row": llama_cpp.LLAMA_SPLIT_MODE_ROW,
    "tensor": llama_cpp.LLAMA_SPLIT_MODE_TENSOR,
}


class _BufferOverride(ctypes.Structure):
    """llama_model_tensor_buft_override, which llama-cpp-python does not declare."""

    _fields_ = (("pattern", ctypes.c_char_p), ("buffer_type", ctypes.c_void_p))


class ModelParams:
    """The C struct, and the arrays that it points to: llama.cpp does not copy them, so they live as long as this."""

    def __init__(self, placement: Placement, *, mtp: bool, mmap: bool) -> None:
        """ModelLoadFailed for an override to a buffer type that this build does not have."""
        params: llama_cpp.llama_model_params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = ALL_LAYERS if placement.gpu_layers is None else placement.gpu_layers
        params.split_mode, params.main_gpu = _SPLIT_MODES[placement.split_mode], placement.main_gpu
        # ggml's AMX code needs its "extra" buffer types; without them weights stay as they are and AVX-512 code runs.
        params.use_extra_bufts = not probe_build().amx_is_broken
        params.load_mtp = mtp
        params.load_mode = llama_cpp.LLAMA_LOAD_MODE_AUTO if mmap else llama_cpp.LLAMA_LOAD_MODE_NONE
        self.struct = params
        if placement.tensor_split is not None:  # llama.cpp reads a share for each device that it could ever have
            self._shares = (ctypes.c_float * llama_cpp.llama_max_devices())(*placement.tensor_split)
            params.tensor_split = ctypes.cast(self._shares, ctypes.POINTER(ctypes.c_float))  # type: ignore[assignment]
        if placement.all_overrides:
            self._overrides = _override_array(placement.all_overrides)
            params.tensor_buft_overrides = ctypes.cast(self._overrides, ctypes.c_void_p)  # type: ignore[assignment]


def _override_array(overrides: tuple[tuple[str, str], ...]) -> ctypes.Array[_BufferOverride]:
    """The pairs as C has them, ended by an empty one."""
    types = buffer_types()
    for pattern, buffer in overrides:
        if buffer not in types:
            raise ModelLoadFailed(
                f"--override-tensor {pattern}={buffer}: there is no buffer type {buffer!r}",
                hint=f"This llama-cpp-python has on this machine: {', '.join(types) or 'none'}.",
            )
    array = (_BufferOverride * (len(overrides) + 1))()
    for slot, (pattern, buffer) in zip(array, overrides, strict=False):
        slot.pattern, slot.buffer_type = pattern.encode(), types[buffer]
    return array
