"""What llama-cpp-python says of how it was built."""

from __future__ import annotations

from dataclasses import replace

import llama_cpp
import pytest

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
