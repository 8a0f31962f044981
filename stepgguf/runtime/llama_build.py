"""How the installed llama-cpp-python was built: what it can use of the machine.

ggml's list of devices is not part of llama-cpp-python's API: its functions are looked up in the library that it has
loaded, and where they cannot be found there are no devices.
"""

from __future__ import annotations

import ctypes
import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepgguf.errors import EngineError

_GPU, _INTEGRATED_GPU = 1, 2  # ggml_backend_dev_type
_GPU_BACKENDS = ("cuda", "metal", "vulkan", "hip")  # each a library of ggml's own
_AMX_GCC = (14, 2)


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU with its memory in bytes; None where it has none of its own and shares the system's."""

    name: str
    total: int | None
    free: int | None


@dataclass(frozen=True, slots=True)
class LlamaBuild:
    """What a llama-cpp-python can do on this machine.

    features: of the CPU code, such as "AVX2" and "AMX_INT8". gpu_offload: whether it has code for a GPU. backends:
    those of "cuda", "metal", "vulkan" and "hip" that it was built with. mtp: whether it has the functions for MTP
    blocks. compiler: of the CPU code, as (name, version), where the library says it.
    """

    version: str
    features: frozenset[str]
    gpu_offload: bool
    gpus: tuple[Gpu, ...]
    mtp: bool
    compiler: tuple[str, tuple[int, ...]] | None
    backends: frozenset[str] = frozenset()

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> LlamaBuild:
        """The build that `stepgguf doctor --json` shows as "engine"."""
        compiler = values["compiler"]
        sets = {name: frozenset(values[name]) for name in ("features", "backends")}
        gpus = tuple(Gpu(**gpu) for gpu in values["gpus"])
        return cls(**{**values, **sets, "gpus": gpus, "compiler": compiler and (compiler[0], tuple(compiler[1]))})

    @property
    def has_amx(self) -> bool:
        """Whether the CPU code uses AMX."""
        return "AMX_INT8" in self.features

    @property
    def amx_is_broken(self) -> bool:
        """Whether AMX code crashes: the compiler must know that _tile_loadconfig reads all 64 bytes of its argument.

        GCC's amxtileintrin.h used to tell it of 8, and is right from 14.2 on. An unknown compiler is not trusted.
        """
        return self.has_amx and (self.compiler is None or (self.compiler[0] == "GCC" and self.compiler[1] < _AMX_GCC))


@functools.cache
def probe_build() -> LlamaBuild:
    """Return the build of the installed llama-cpp-python, found out once. EngineError says why there is none."""
    try:
        import llama_cpp
    except ModuleNotFoundError as error:
        raise EngineError("llama-cpp-python is not installed", hint="stepgguf setup") from error
    except (OSError, RuntimeError) as error:
        raise EngineError(
            f"llama-cpp-python cannot be loaded: {error}", hint="stepgguf setup --rebuild"
        ) from error  # fmt: skip
    from stepgguf.runtime.llama import mtp_api

    folder = Path(str(llama_cpp.__file__)).parent / "lib"
    return LlamaBuild(
        version=llama_cpp.__version__,
        features=parse_features(llama_cpp.llama_print_system_info().decode()),
        gpu_offload=bool(llama_cpp.llama_supports_gpu_offload()),
        gpus=_gpus(llama_cpp.llama_cpp._lib),
        mtp=mtp_api.AVAILABLE,
        compiler=_compiler(folder),
        backends=frozenset(name for name in _GPU_BACKENDS if any(folder.glob(f"libggml-{name}.*"))),
    )


def parse_features(system_info: str) -> frozenset[str]:
    """Return the features that are on, from a text of llama_print_system_info such as "CPU : AVX2 = 1 | AVX512 = 0 |
    "."""
    return frozenset(re.findall(r"(\w+) = (?!0\b)\w+", system_info))


def _gpus(library: ctypes.CDLL) -> tuple[Gpu, ...]:
    """Return the GPUs that llama.cpp puts models on, with their memory now: an integrated one only where it is alone.

    There are none where the library lacks the functions.
    """
    try:
        device_type, text = library.ggml_backend_dev_type, library.ggml_backend_dev_description
        memory = library.ggml_backend_dev_memory
    except AttributeError:
        return ()
    device_type.argtypes, text.argtypes, text.restype = [ctypes.c_void_p], [ctypes.c_void_p], ctypes.c_char_p
    memory.argtypes, memory.restype = [ctypes.c_void_p, *[ctypes.POINTER(ctypes.c_size_t)] * 2], None
    cards, integrated = [], []
    for device in _devices(library):
        name = text(device).decode(errors="replace")
        if device_type(device) == _GPU:
            free, total = ctypes.c_size_t(), ctypes.c_size_t()
            memory(device, ctypes.byref(free), ctypes.byref(total))
            cards.append(Gpu(name, total.value, free.value))
        elif device_type(device) == _INTEGRATED_GPU:
            integrated.append(Gpu(name, None, None))  # what it says is the system's memory
    return tuple(cards or integrated)


@functools.cache
def buffer_types() -> dict[str, int]:
    """Return each device's buffer type by its name, such as CPU or CUDA0, as llama-server's --override-tensor has them.

    The values are ggml's pointers. There are none where the library lacks the functions.
    """
    import llama_cpp

    library = llama_cpp.llama_cpp._lib
    try:
        of_device, name = library.ggml_backend_dev_buffer_type, library.ggml_backend_buft_name
    except AttributeError:
        return {}
    of_device.argtypes, of_device.restype = [ctypes.c_void_p], ctypes.c_void_p
    name.argtypes, name.restype = [ctypes.c_void_p], ctypes.c_char_p
    return {name(buffer).decode(): buffer for buffer in map(of_device, _devices(library)) if buffer}


def _devices(library: ctypes.CDLL) -> list[int]:
    """Return ggml's pointers to its devices, in its order. There are none where the library lacks the functions."""
    try:
        count, get = library.ggml_backend_dev_count, library.ggml_backend_dev_get
    except AttributeError:
        return []
    count.restype = ctypes.c_size_t
    get.argtypes, get.restype = [ctypes.c_size_t], ctypes.c_void_p
    return [get(i) for i in range(count())]


def _compiler(folder: Path) -> tuple[str, tuple[int, ...]] | None:
    """Return the compiler of the CPU code, from the .comment section that GCC and clang leave in ELF files."""
    for library in sorted(folder.glob("libggml-cpu*.so")):
        found = re.search(rb"(GCC): \([^)\0]*\) (\d+(?:\.\d+)+)|(clang) version (\d+(?:\.\d+)+)", library.read_bytes())
        if found:
            name, version = (part.decode() for part in found.groups() if part)
            return name, tuple(map(int, version.split(".")))
    return None
