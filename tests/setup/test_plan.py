"""The commands that machines of each kind are given, and what is there already."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from stepgguf.errors import SetupError
from stepgguf.files import installed
from stepgguf.fit.backends import BACKENDS
from stepgguf.fit.capacity import Finding
from stepgguf.fit.machine import Machine
from stepgguf.runtime.llama_build import LlamaBuild
from stepgguf.setup.engine import InstalledEngine
from stepgguf.setup.plan import Step, choose_backend, plan_steps
from stepgguf.setup.tools import Host
from tests.fit.machines import CARD, CPU_BUILD, CUDA_BUILD, LINUX, MAC, SPARK, STRIX

NEEDED = (Requirement("llama-cpp-python>=0.3.36"), Requirement("packaging>=20"))
VERDICT = Finding("ok", "engine", "")
NONE = InstalledEngine(None, VERDICT)


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A folder with every program that a build may need; they do nothing."""
    for name in ("cc", "c++", "nvcc", "glslc", "hipcc", "xcode-select"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    return tmp_path


def plan(
    machine: Machine, tools: Path, engine: InstalledEngine = NONE, *, rebuild: bool = False, **environ: str
) -> list[Step]:
    host = Host(machine.system, {"PATH": str(tools), **environ}, run=lambda command: b"")
    return plan_steps(choose_backend("auto", machine, engine), host, machine, NEEDED, engine, rebuild=rebuild)


@pytest.mark.parametrize(
    ("machine", "environment"),
    [
        (SPARK, {"CMAKE_ARGS": "-DGGML_CUDA=on -DCMAKE_CUDA_ARCHITECTURES=121"}),
        (CARD, {"CMAKE_ARGS": "-DGGML_CUDA=on"}),
        (STRIX, {"CMAKE_ARGS": "-DGGML_VULKAN=on"}),
        (MAC, {"CMAKE_ARGS": "-DGGML_METAL=on"}),
        (LINUX, {}),
    ],
)
def test_the_engine_is_built_from_source_for_the_machines_gpu(
    machine: Machine, environment: dict[str, str], tools: Path
) -> None:
    build, rest = plan(machine, tools)
    assert build.environment == environment
    assert build.command == (
        sys.executable, "-m", "pip", "install", "--verbose", "--no-cache-dir", "--force-reinstall", "--no-deps",
        "--no-binary", "llama-cpp-python", "llama-cpp-python>=0.3.36",
    )  # fmt: skip
    assert rest.command == (sys.executable, "-m", "pip", "install", "llama-cpp-python>=0.3.36", "packaging>=20")
    assert not rest.environment


def test_an_environment_without_pip_is_installed_into_by_uv(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pip", None)
    monkeypatch.setenv("PATH", str(tools))
    with pytest.raises(SetupError, match="has no pip, and there is no uv on the PATH"):
        plan(CARD, tools)
    (tools / "uv").write_text("#!/bin/sh\n")
    (tools / "uv").chmod(0o755)
    build, rest = plan(CARD, tools)
    into = ("uv", "pip", "install", "--python", sys.executable)
    assert build.command[:5] == rest.command[:5] == into
    assert build.command[5:] == (
        "--verbose", "--no-cache", "--reinstall", "--no-deps", "--no-binary", "llama-cpp-python",
        "llama-cpp-python>=0.3.36",
    )  # fmt: skip


def test_a_python_of_the_systems_is_left_alone(tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "EXTERNALLY-MANAGED").write_text("[externally-managed]\n")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    assert plan(CARD, tools), "a virtual environment of that Python may be installed into"
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    with pytest.raises(SetupError, match="belongs to the system") as caught:
        plan(CARD, tools)
    assert "pipx" in (caught.value.hint or "")


def test_what_the_user_tells_cmake_is_added_and_has_the_last_word(tools: Path) -> None:
    build, _ = plan(SPARK, tools, CMAKE_ARGS="-DGGML_NATIVE=off -DCMAKE_CUDA_ARCHITECTURES=90")
    assert build.environment["CMAKE_ARGS"] == (
        "-DGGML_CUDA=on -DCMAKE_CUDA_ARCHITECTURES=121 -DGGML_NATIVE=off -DCMAKE_CUDA_ARCHITECTURES=90"
    )


IDLE = replace(CUDA_BUILD, gpus=())


@pytest.mark.parametrize(
    ("machine", "build", "is_there"),
    [
        (CARD, CUDA_BUILD, True),
        (CARD, IDLE, True),  # a driver that is missing is not mended by another build
        (CARD, CPU_BUILD, False),
        (CARD, replace(CUDA_BUILD, version="0.3.9"), False),
        (CARD, replace(CUDA_BUILD, version="0.4.0"), True),
        (STRIX, CPU_BUILD, False),
        (STRIX, replace(CUDA_BUILD, backends=frozenset({"hip"})), True),
        (STRIX, replace(IDLE, backends=frozenset({"hip"})), False),
        (LINUX, CPU_BUILD, True),
        (LINUX, CUDA_BUILD, True),  # a GPU that only the engine knows
        (LINUX, IDLE, False),
    ],
)
def test_what_is_built_for_this_already_is_not_built_again(
    machine: Machine, build: LlamaBuild, is_there: bool, tools: Path
) -> None:
    engine = InstalledEngine(build, VERDICT)
    assert (plan(machine, tools, engine) == []) == is_there
    assert len(plan(machine, tools, engine, rebuild=True)) == 2


def test_packages_that_are_missing_are_installed_without_a_build(tools: Path) -> None:
    host = Host("Linux", {"PATH": str(tools)})
    needed = (*NEEDED, Requirement("no-such-package>=1; python_version > '3'"))
    steps = plan_steps("none", host, LINUX, needed, InstalledEngine(CPU_BUILD, VERDICT))
    assert [step.command[4:] for step in steps] == [
        ("llama-cpp-python>=0.3.36", "packaging>=20", "no-such-package>=1"),
    ]


@pytest.mark.parametrize(("choice", "machine"), [("metal", LINUX), ("cuda", MAC), ("vulkan", MAC), ("none", MAC)])
def test_a_backend_that_the_system_lacks_is_refused(choice: str, machine: Machine) -> None:
    with pytest.raises(SetupError) as caught:
        choose_backend(choice, machine, NONE)  # type: ignore[arg-type]
    assert (caught.value.hint or "").startswith("stepgguf setup")


def test_what_is_asked_for_is_built_though_another_is_in_use() -> None:
    engine = InstalledEngine(CUDA_BUILD, VERDICT)
    assert [choose_backend(name, CARD, engine) for name in ("vulkan", "none", "auto")] == ["vulkan", "none", "cuda"]
    assert not engine.suits(NEEDED[0], "vulkan")
    assert not engine.suits(NEEDED[0], "none")


def test_every_backend_can_be_chosen_somewhere() -> None:
    for name in BACKENDS:
        machine = MAC if name == "metal" else LINUX
        assert choose_backend(name, machine, NONE) == name


def test_a_step_is_shown_as_a_line_that_a_shell_runs() -> None:
    value = "-DA=on -DB='c d'"
    line = str(Step("", (sys.executable, "-c", "import os; print(os.environ['CMAKE_ARGS'])"), {"CMAKE_ARGS": value}))
    assert subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=True).stdout == f"{value}\n"


@pytest.mark.slow
def test_pip_is_there_in_this_environment() -> None:
    asked = subprocess.run([*installed.install_command(), "--help"], capture_output=True, text=True, check=True).stdout
    for option in ("--no-cache-dir", "--force-reinstall", "--no-deps", "--no-binary", "--verbose"):
        assert option in asked
