"""What building llama.cpp needs of a machine: found, or missing with the one command that gets all of it.

CMake and ninja are not here: the build gets them from PyPI where they are not installed. Nor are Python's headers:
llama-cpp-python loads the library through ctypes.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from stepgguf.errors import SetupError
from stepgguf.fit.backends import BACKENDS, BackendName
from stepgguf.fit.machine import RunCommand, run_command

_NVIDIA_REPOSITORY = "NVIDIA's package repository: https://developer.nvidia.com/cuda-downloads"


@dataclass(frozen=True, slots=True)
class _Tool:
    """What a build needs, in words, and the packages that have it: Debian's and Ubuntu's, Fedora's."""

    what: str
    apt: str
    dnf: str


_C = _Tool("a C compiler (cc)", "build-essential", "gcc")
_CXX = _Tool("a C++ compiler (c++)", "build-essential", "gcc-c++")
_NVCC = _Tool("CUDA's compiler (nvcc)", "cuda-toolkit", "cuda-toolkit")
_CUBLAS = _Tool("cuBLAS' headers", "cuda-toolkit", "cuda-toolkit")
_GLSLC = _Tool("a compiler of shaders (glslc)", "glslc", "glslc")
_HIPCC = _Tool("ROCm's compiler (hipcc)", "hipcc", "hipcc")
_HEADERS: dict[BackendName, tuple[tuple[str, _Tool], ...]] = {
    "vulkan": (
        ("vulkan/vulkan.h", _Tool("Vulkan's headers", "libvulkan-dev", "vulkan-loader-devel")),
        ("spirv/unified1/spirv.h", _Tool("SPIR-V's headers", "spirv-headers", "spirv-headers-devel")),
    ),
    "hip": (
        ("hipblas/hipblas.h", _Tool("hipBLAS' headers", "libhipblas-dev", "hipblas-devel")),
        ("rocblas/rocblas.h", _Tool("rocBLAS' headers", "librocblas-dev", "rocblas-devel")),
    ),
}


@dataclass(frozen=True, slots=True)
class Host:
    """Where tools are looked for: `environ` as os.environ; `root` and `run` as in fit/machine.py."""

    system: str
    environ: Mapping[str, str]
    root: Path = Path("/")
    run: RunCommand = run_command

    def find(self, name: str, *folders: str) -> str | None:
        """The path of a program that is on the PATH or in one of these folders."""
        path = [self.environ.get("PATH", ""), *(str(self.root / folder) for folder in folders)]
        return shutil.which(name, path=":".join(path))

    def compiler(self, variable: str, *names: str) -> str | None:
        """The compiler that a variable names, maybe with options after its path; without it the first one there is."""
        named = shlex.split(self.environ.get(variable, ""))[:1]
        return next(filter(None, map(self.find, named or names)), None)


def find_tools(backend: BackendName, host: Host) -> dict[str, str]:
    """Return the environment variables that lead the build to tools which are not on the PATH.

    Raises SetupError, which names everything that is missing and the command that gets it.
    """
    missing = list(_missing(backend, host))
    if missing:
        title = BACKENDS[backend].title
        needs = f"building llama.cpp for {title} needs what this machine lacks: {', '.join(t.what for t in missing)}"
        raise SetupError(needs, hint=_how_to_get(missing, host, instead=backend != "none"))
    return _variables(backend, host)


def _missing(backend: BackendName, host: Host) -> Iterator[_Tool]:
    """What is not there. On macOS Apple's stubs of the compilers always are, so that xcode-select is asked."""
    if host.system == "Darwin":
        if host.run(("xcode-select", "-p")) is None:
            yield _Tool("Xcode's command line tools", "", "")
        return
    compiler = host.compiler("CC", "cc", "gcc", "clang")
    if compiler is None:
        yield _compiler_tool(host, "CC", _C)
    if host.compiler("CXX", "c++", "g++", "clang++") is None:
        yield _compiler_tool(host, "CXX", _CXX)
    if backend == "cuda":
        yield from _missing_of_cuda(host, compiler)
    if backend == "vulkan" and host.find("glslc", *_sdk(host, "bin")) is None:
        yield _GLSLC
    if backend == "hip" and host.find("hipcc", *_rocm(host, "bin")) is None:
        yield _HIPCC
    folders = [*_sdk(host, "include"), *_rocm(host, "include")]
    for header, tool in _HEADERS.get(backend, ()):
        if compiler is None or not _has_header(compiler, header, folders, host):
            yield tool


def _compiler_tool(host: Host, variable: str, usual: _Tool) -> _Tool:
    """The compiler that is missing: the one that a variable names, whose package has its name, or the usual one."""
    named = shlex.split(host.environ.get(variable, ""))[:1]
    return _Tool(f"{named[0]} (which {variable} names)", named[0], named[0]) if named else usual


def _missing_of_cuda(host: Host, compiler: str | None) -> Iterator[_Tool]:
    """nvcc may be there without the libraries. It knows where those are, but can tell only with a C compiler."""
    nvcc, check = _nvcc(host), ("-E", "-allow-unsupported-compiler", "-include", "cublas_v2.h", "-x", "cu", "/dev/null")
    if nvcc is None:
        yield _NVCC
    elif compiler is not None and host.run((nvcc, *check)) is None:
        yield _CUBLAS


def _nvcc(host: Host) -> str | None:
    """CUDA's compiler. NVIDIA's packages put it where no PATH leads, and CMake does not look there either."""
    return host.compiler("CUDACXX", "nvcc", str(host.root / "usr/local/cuda/bin/nvcc"))


def _sdk(host: Host, folder: str) -> list[str]:
    """The folder of LunarG's Vulkan SDK, where its setup-env.sh was sourced."""
    return [f"{host.environ['VULKAN_SDK']}/{folder}"] if host.environ.get("VULKAN_SDK") else []


def _rocm(host: Host, folder: str) -> list[str]:
    return [f"{host.environ.get('ROCM_PATH') or 'opt/rocm'}/{folder}"]


def _has_header(compiler: str, header: str, folders: list[str], host: Host) -> bool:
    """Whether a C compiler finds a header, in its own folders or in these."""
    includes = [f"-I{host.root / folder}" for folder in folders]
    return host.run((compiler, "-E", *includes, "-include", header, "-x", "c", "/dev/null")) is not None


def _variables(backend: BackendName, host: Host) -> dict[str, str]:
    """What CMake and ROCm read from the environment to find a compiler that is not on the PATH."""
    if backend == "cuda" and host.find("nvcc") is None and not host.environ.get("CUDACXX"):
        return {"CUDACXX": _nvcc(host) or ""}
    if backend == "hip":  # as llama.cpp's build instructions have it
        hipconfig = host.find("hipconfig", *_rocm(host, "bin"))
        clang, root = (host.run((hipconfig, option)) if hipconfig else None for option in ("-l", "-R"))
        found = {"HIPCXX": clang and f"{clang.decode().strip()}/clang", "HIP_PATH": root and root.decode().strip()}
        return {name: value for name, value in found.items() if value and not host.environ.get(name)}
    return {}


def _how_to_get(missing: list[_Tool], host: Host, *, instead: bool) -> str:
    """One command for everything. instead: offer the CPU, which needs less."""
    apt, dnf = (" ".join(dict.fromkeys(getattr(tool, name) for tool in missing)) for name in ("apt", "dnf"))
    if host.system == "Darwin":
        return "xcode-select --install"
    if host.find("apt-get"):
        command = f"sudo apt-get install {apt}"
    elif host.find("dnf"):
        command = f"sudo dnf install {dnf}"
    else:
        command = f"Install them with this system's package manager; Debian's packages are {apt}"
    origin = f" (from {_NVIDIA_REPOSITORY})" if {_NVCC, _CUBLAS} & {*missing} else ""
    cpu = "; or, to do without the GPU: stepgguf setup --gpu none" if instead else ""
    return f"{command}{origin}{cpu}"
