"""What llama-cpp-python says of how it was built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import llama_cpp
import pytest

from stepgguf.files.byte_sizes import GIB
from stepgguf.runtime import llama_build
from stepgguf.runtime.llama_build import LlamaBuild, parse_features

BUILD = LlamaBuild("0.3.36", frozenset({"AVX2"}), gpu_offload=False, gpus=(), mtp=True, compiler=("GCC", (12, 2, 0)))


def test_the_installed_build() -> None:
    build = llama_build.probe_build()
    assert build.version == llama_cpp.__version__
    assert build.gpu_offload == llama_cpp.llama_supports_gpu_offload()
    assert bool(build.gpus) <= build.gpu_offload
    for feature in build.features:
        assert f"{feature} = " in llama_cpp.llama_print_system_info().decode()


def test_features_are_those_that_are_on() -> None:
    text = "CUDA : ARCHS = 900 | USE_GRAPHS = 1 | CPU : SSE3 = 1 | AVX512 = 0 | AMX_INT8 = 1 | SVE_CNT = 16 | "
    assert parse_features(text) == {"ARCHS", "USE_GRAPHS", "SSE3", "AMX_INT8", "SVE_CNT"}


@pytest.mark.parametrize(
    ("compiler", "broken"),
    [
        (("GCC", (12, 2, 0)), True),
        (("GCC", (14, 1, 0)), True),
        (("GCC", (14, 2, 0)), False),
        (("GCC", (15, 1, 0)), False),
        (("clang", (12, 0, 1)), False),
        (None, True),
    ],
)
def test_amx_code_of_an_old_or_unknown_compiler_is_not_trusted(
    compiler: tuple[str, tuple[int, ...]] | None, broken: bool
) -> None:
    assert replace(BUILD, features=frozenset({"AMX_INT8"}), compiler=compiler).amx_is_broken == broken
    assert not replace(BUILD, compiler=compiler).amx_is_broken


class Library:
    """ggml's functions for devices of some types, as ctypes would find them. Each has 8 GiB, 5 of them free."""

    def __init__(self, *types: int) -> None:
        self.types = types

    def __getattr__(self, name: str) -> Function:
        if not name.startswith("ggml_backend_dev_"):
            raise AttributeError(name)
        return Function(getattr(self, f"_{name.removeprefix('ggml_backend_dev_')}"))

    def _count(self) -> int:
        return len(self.types)

    def _get(self, i: int) -> int:
        return i

    def _type(self, device: int) -> int:
        return self.types[device]

    def _description(self, device: int) -> bytes:
        return f"device {device}".encode()

    def _memory(self, device: int, free: Any, total: Any) -> None:
        free._obj.value, total._obj.value = 5 * GIB, 8 * GIB


class Function:
    """Can be called, and told its types."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)


CPU, CARD, INTEGRATED = 0, 1, 2  # ggml_backend_dev_type


@pytest.mark.parametrize(
    ("types", "gpus"),
    [
        ((CPU,), []),
        ((CARD, INTEGRATED, CARD, CPU), [("device 0", 8 * GIB), ("device 2", 8 * GIB)]),
        ((INTEGRATED, CPU), [("device 0", None)]),
    ],
)
def test_an_integrated_gpu_is_used_where_it_is_alone_and_has_no_memory_of_its_own(
    types: tuple[int, ...], gpus: list[tuple[str, int | None]]
) -> None:
    assert [(gpu.name, gpu.total) for gpu in llama_build._gpus(Library(*types))] == gpus  # type: ignore[arg-type]
