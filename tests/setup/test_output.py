"""What is read from recorded output of pip 23.2 and uv 0.13 while they built llama-cpp-python 0.3.36.

tests/data/setup: excerpts, with lines cut to 200 characters. The failures: Vulkan was asked for and is not installed;
g++ was told -std=none.
"""

from __future__ import annotations

import pytest

from stepgguf.setup.output import BuildProgress, find_causes
from tests.conftest import DATA


def recorded(name: str) -> list[str]:
    return (DATA / "setup" / f"{name}.txt").read_text().splitlines(keepends=True)


@pytest.mark.parametrize(("name", "last"), [("pip", 62), ("uv", 8)])
def test_stages_and_steps_are_read_from_a_build(name: str, last: int) -> None:
    progress, seen = BuildProgress(), []
    for line in recorded(name):
        progress.read(line)
        if progress.stage not in seen:
            seen.append(progress.stage)
    assert seen == ["preparing", "downloading", "configuring", "compiling"]
    assert (progress.n_done, progress.n_steps) == (last, 193)


def test_the_last_stage_is_the_installation() -> None:
    for line in ("Installing collected packages: llama-cpp-python\n", "Prepared 1 package in 5m 02s\n"):
        progress = BuildProgress("compiling", 193, 193)
        progress.read(line)
        assert progress.stage == "installing"
    progress = BuildProgress("compiling", 3, 193)
    progress.read("  Installing collected packages: pathspec, packaging, scikit-build-core\n")  # of the build's own
    assert progress.stage == "compiling"


def test_a_build_within_the_build_does_not_count() -> None:
    progress = BuildProgress()
    for line in ("  [40/214] Performing build step for 'vulkan-shaders-gen'\n", "  [1/2] /usr/bin/g++ -O3\n"):
        progress.read(line)
    assert (progress.n_done, progress.n_steps) == (40, 214)


@pytest.mark.parametrize("name", ["pip-cmake-error", "uv-cmake-error"])
def test_a_failed_configuration_is_told_in_cmakes_words(name: str) -> None:
    assert find_causes(recorded(name)) == [
        "CMake Error at /usr/share/cmake-3.25/Modules/FindPackageHandleStandardArgs.cmake:230 (message):",
        "Could NOT find Vulkan (missing: Vulkan_LIBRARY Vulkan_INCLUDE_DIR glslc)",
        '(found version "")',
    ]


def test_a_failed_compilation_is_told_in_the_compilers_words() -> None:
    assert find_causes(recorded("pip-compiler-error")) == [
        "g++: error: unrecognized command-line option ‘-std=none’",
    ]


def test_what_no_compiler_explains_is_told_by_the_last_lines() -> None:
    lines = [f"line {n}\n" for n in range(50)] + ["\n", "ERROR: No matching distribution found for llama-cpp-python\n"]
    causes = find_causes(lines)
    assert causes[-1] == "ERROR: No matching distribution found for llama-cpp-python"
    assert causes[0] == "line 43"
