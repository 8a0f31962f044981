"""What a build needs of a machine, with stub programs on a PATH of their own, and with this machine's compiler."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from stepgguf.errors import SetupError
from stepgguf.fit.backends import BackendName
from stepgguf.setup.tools import Host, find_tools

KNOWS_EVERY_HEADER, KNOWS_NO_HEADER = "exit 0", "exit 1"


def host(root: Path, programs: dict[str, str], **environ: str) -> Host:
    """A Linux with these shell scripts in /bin, and nothing else."""
    for name, script in programs.items():
        path = root / (name if "/" in name else f"bin/{name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    return Host("Linux", {"PATH": str(root / "bin"), **environ}, root)


COMPILERS = {"cc": KNOWS_EVERY_HEADER, "c++": KNOWS_EVERY_HEADER}
NO_COMPILERS = ["a C compiler", "a C++ compiler"]


@pytest.mark.parametrize(
    ("backend", "programs", "missing", "packages"),
    [
        ("none", {}, NO_COMPILERS, "build-essential"),
        ("none", {"gcc": ""}, ["a C++ compiler"], "build-essential"),
        ("cuda", COMPILERS, ["nvcc"], "cuda-toolkit"),
        ("cuda", {}, [*NO_COMPILERS, "nvcc"], "build-essential cuda-toolkit"),
        ("cuda", {"nvcc": KNOWS_NO_HEADER}, NO_COMPILERS, "build-essential"),
        ("cuda", COMPILERS | {"nvcc": KNOWS_NO_HEADER}, ["cuBLAS' headers"], "cuda-toolkit"),
        ("vulkan", {"cc": KNOWS_NO_HEADER, "c++": ""}, ["glslc", "Vulkan's headers", "SPIR-V's headers"],
         "glslc libvulkan-dev spirv-headers"),
        ("vulkan", COMPILERS, ["glslc"], "glslc"),
        ("hip", {"cc": KNOWS_NO_HEADER, "c++": ""}, ["hipcc", "hipBLAS' headers", "rocBLAS' headers"],
         "hipcc libhipblas-dev librocblas-dev"),
    ],
)  # fmt: skip
def test_everything_that_is_missing_is_named_with_one_command(
    backend: BackendName, programs: dict[str, str], missing: list[str], packages: str, tmp_path: Path
) -> None:
    with pytest.raises(SetupError) as caught:
        find_tools(backend, host(tmp_path, programs | {"apt-get": ""}))
    named = caught.value.message.partition("lacks: ")[2].split(", ")
    assert [part in text for part, text in zip(missing, named, strict=True)] == [True] * len(missing)
    hint = caught.value.hint or ""
    assert hint.startswith(f"sudo apt-get install {packages}")
    assert ("stepgguf setup --gpu none" in hint) == (backend != "none")
    assert ("developer.nvidia.com" in hint) == ("cuda-toolkit" in packages)


def test_fedora_has_other_names(tmp_path: Path) -> None:
    with pytest.raises(SetupError) as caught:
        find_tools("vulkan", host(tmp_path, {"dnf": ""}))
    names = "gcc gcc-c++ glslc vulkan-loader-devel spirv-headers-devel"
    assert (caught.value.hint or "").startswith(f"sudo dnf install {names};")


def test_a_mac_needs_xcodes_command_line_tools(tmp_path: Path) -> None:
    asked = []
    mac = Host("Darwin", {"PATH": str(tmp_path)}, tmp_path, lambda command: asked.append(command))
    with pytest.raises(SetupError) as caught:
        find_tools("metal", mac)
    assert (asked, caught.value.hint) == ([("xcode-select", "-p")], "xcode-select --install")
    assert find_tools("metal", Host("Darwin", {}, tmp_path, lambda command: b"/Library/Developer\n")) == {}


def test_cuda_is_found_where_its_packages_put_it(tmp_path: Path) -> None:
    off_the_path = host(tmp_path, COMPILERS | {"usr/local/cuda/bin/nvcc": KNOWS_EVERY_HEADER})
    assert find_tools("cuda", off_the_path) == {"CUDACXX": str(tmp_path / "usr/local/cuda/bin/nvcc")}
    on_the_path = host(tmp_path, {"nvcc": KNOWS_EVERY_HEADER})
    assert find_tools("cuda", on_the_path) == {}


def test_what_the_user_names_is_used(tmp_path: Path) -> None:
    there = host(tmp_path, {"opt/gcc-14": "", "opt/g++-14": "", "opt/nvcc": KNOWS_EVERY_HEADER})
    named = {"CC": f"{tmp_path}/opt/gcc-14 -pipe", "CXX": f"{tmp_path}/opt/g++-14", "CUDACXX": f"{tmp_path}/opt/nvcc"}
    assert find_tools("cuda", Host("Linux", {**there.environ, **named}, tmp_path)) == {}
    with pytest.raises(SetupError, match="nvcc"):
        find_tools("cuda", Host("Linux", {**there.environ, **named, "CUDACXX": "gone"}, tmp_path))
    with pytest.raises(SetupError, match=r"lacks: gcc-14 \(which CC names\), a C\+\+ compiler \(c\+\+\)$") as caught:
        find_tools("none", host(tmp_path, {"apt-get": ""}, CC="gcc-14 -pipe"))
    assert caught.value.hint == "sudo apt-get install gcc-14 build-essential"


def test_rocm_says_where_its_compiler_is(tmp_path: Path) -> None:
    answers = "case $1 in -l) echo /opt/rocm/llvm/bin;; -R) echo /opt/rocm;; esac"
    rocm = host(tmp_path, COMPILERS | {"opt/rocm/bin/hipcc": "", "opt/rocm/bin/hipconfig": answers})
    assert find_tools("hip", rocm) == {"HIPCXX": "/opt/rocm/llvm/bin/clang", "HIP_PATH": "/opt/rocm"}


@pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc")
def test_headers_are_looked_for_by_the_compiler_itself(tmp_path: Path) -> None:
    """Vulkan's and SPIR-V's, in the folder of an SDK and nowhere else."""
    sdk = tmp_path / "sdk"
    programs = {"cc": f'exec {shutil.which("gcc")} -nostdinc "$@"', "c++": "", "sdk/bin/glslc": ""}
    there = host(tmp_path, programs, VULKAN_SDK=str(sdk))
    for header in ("vulkan/vulkan.h", "spirv/unified1/spirv.h"):
        with pytest.raises(SetupError, match="headers"):
            find_tools("vulkan", there)
        (sdk / "include" / header).parent.mkdir(parents=True)
        (sdk / "include" / header).write_text("int x;\n")
    assert find_tools("vulkan", there) == {}
