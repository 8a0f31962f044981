"""Which of ggml's GPU backends a machine wants, and how llama.cpp's CMake is asked for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stepgguf.fit.machine import Machine, MachineKind

BackendName = Literal["cuda", "metal", "vulkan", "hip", "none"]  # as --gpu takes it; none is the CPU alone


@dataclass(frozen=True, slots=True)
class Backend:
    """title: for people. system: the one that it works on, as platform.system() names it. cmake: what asks for it."""

    title: str
    system: str | None
    cmake: tuple[str, ...]


BACKENDS: dict[BackendName, Backend] = {
    "cuda": Backend("CUDA", "Linux", ("-DGGML_CUDA=on",)),
    "metal": Backend("Metal", "Darwin", ("-DGGML_METAL=on",)),
    "vulkan": Backend("Vulkan", "Linux", ("-DGGML_VULKAN=on",)),
    "hip": Backend("HIP", "Linux", ("-DGGML_HIP=on",)),
    # llama-cpp-python's CMakeLists.txt turns Metal on by force on macOS, so that there is no build without it.
    "none": Backend("the CPU", "Linux", ()),
}
_WANTED: dict[MachineKind, BackendName] = {
    "spark": "cuda", "gpu": "cuda", "mac": "metal", "strix": "vulkan", "cpu": "none",
}  # fmt: skip
# ggml compiles for the GPUs that are there while it is built. A Spark's is named, as containers are built without one.
_CUDA_ARCHITECTURES: dict[MachineKind, str] = {"spark": "121"}


def wanted_backend(machine: Machine) -> BackendName:
    """The backend that uses this machine's GPU; "none" where it has no GPU that we know."""
    return _WANTED[machine.kind]


def cmake_arguments(name: BackendName, machine: Machine) -> tuple[str, ...]:
    """What CMake is told to build llama.cpp with a backend for a machine."""
    architectures = _CUDA_ARCHITECTURES.get(machine.kind) if name == "cuda" else None
    named = (f"-DCMAKE_CUDA_ARCHITECTURES={architectures}",) if architectures else ()
    return (*BACKENDS[name].cmake, *named)
