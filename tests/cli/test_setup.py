"""stepgguf setup as a user meets it. A build of its own is what `make` runs before these tests."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from stepgguf.cli import build_meter
from stepgguf.cli.build_meter import BuildMeter
from stepgguf.cli.main import main
from stepgguf.setup.engine import InstalledEngine
from stepgguf.setup.plan import Step
from tests.fit.machines import CARD, CPU_BUILD, CUDA_BUILD, LINUX
from tests.setup.test_output import recorded
from tests.setup.test_plan import VERDICT


@pytest.fixture(autouse=True)
def _machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stepgguf.fit.machine.probe_machine", lambda: LINUX)


@pytest.mark.slow
def test_what_is_there_is_left_as_it_is(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["setup"]) == 0
    out, err = capfd.readouterr()
    assert out.startswith("ok    engine     llama-cpp-python 0.3.")
    assert "--rebuild builds it again" in err


@pytest.mark.slow
def test_a_dry_run_prints_commands_and_runs_none(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CMAKE_ARGS", "-DGGML_NATIVE=off")
    assert main(["setup", "--rebuild", "--dry-run"]) == 0
    first, second = map(shlex.split, capfd.readouterr().out.splitlines())
    assert first[:2] == ["CMAKE_ARGS=-DGGML_NATIVE=off", sys.executable]
    assert first[-1].startswith("llama-cpp-python")
    assert any(word.startswith("fastapi>=") for word in second)


def test_missing_tools_end_it_before_anything_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("stepgguf.setup.engine.probe_engine", lambda: InstalledEngine(None, VERDICT))
    monkeypatch.setattr(os, "environ", {**os.environ, "PATH": str(tmp_path), "CC": "", "CXX": ""})
    assert main(["setup"]) == 1
    err = capfd.readouterr().err
    assert "lacks: a C compiler (cc), a C++ compiler (c++)" in err
    assert "hint: " in err


@pytest.mark.parametrize(
    ("after", "code", "text"),
    [
        (CUDA_BUILD, 0, "ok    engine     llama-cpp-python 0.3.36 uses NVIDIA: layers can be offloaded"),
        (
            replace(CUDA_BUILD, gpus=()),
            1,
            "fail  engine     llama-cpp-python 0.3.36 is built for GPUs (CUDA) but finds",
        ),
        (CPU_BUILD, 1, "fail  engine     llama-cpp-python 0.3.36 is built without CUDA and leaves the GPU idle"),
    ],
)
def test_the_exit_code_says_whether_the_gpu_is_used(
    after: object, code: int, text: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    engines = [InstalledEngine(None, VERDICT), InstalledEngine(after, VERDICT)]  # type: ignore[arg-type]
    ran = []
    monkeypatch.setattr("stepgguf.fit.machine.probe_machine", lambda: CARD)
    monkeypatch.setattr("stepgguf.setup.engine.probe_engine", lambda: engines.pop(0))
    monkeypatch.setattr("stepgguf.setup.plan.find_tools", lambda backend, host: {"CUDACXX": "/opt/nvcc"})
    monkeypatch.setattr("stepgguf.setup.run.run_step", lambda step, log, show: ran.append(step))
    assert main(["setup"]) == code
    assert text in capfd.readouterr().out
    assert [step.title for step in ran] == ["building llama-cpp-python for CUDA", "installing the other packages"]
    assert ran[0].environment == {"CUDACXX": "/opt/nvcc", "CMAKE_ARGS": "-DGGML_CUDA=on"}


def test_ctrl_c_exits_with_130(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def interrupt(step: Step, log: Path, show: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("stepgguf.setup.engine.probe_engine", lambda: InstalledEngine(None, VERDICT))
    monkeypatch.setattr("stepgguf.setup.plan.find_tools", lambda backend, host: {})
    monkeypatch.setattr("stepgguf.setup.run.run_step", interrupt)
    assert main(["setup"]) == 130
    assert "interrupted; what was installed before is left as it was" in capfd.readouterr().err


def test_a_build_without_a_terminal_says_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build_meter, "_PLAIN_SECONDS", 0.0)
    with BuildMeter("building it") as meter:
        for line in recorded("pip"):
            meter.show(line)
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == "building it ..."
    assert "building it: compiling 9/193, 0:00 so far" in lines
    assert lines[-2] == "building it: compiling 62/193, 0:00 so far, about 0:00 left"
    assert lines[-1] == "building it: done in 0:00"
