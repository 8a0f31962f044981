"""What this package's metadata asks for, against what pip says of this environment."""

from __future__ import annotations

import pytest
from packaging.requirements import Requirement

from stepgguf.setup.requirements import ENGINE, are_met, engine_requirement, run_requirements


def test_the_extra_for_running_is_read_from_the_metadata() -> None:
    names = {requirement.name for requirement in run_requirements()}
    assert {ENGINE, "fastapi", "uvicorn"} <= names
    assert not names & {"numpy", "torch", "pytest", "tomli"}
    assert "0.3.36" in engine_requirement(run_requirements()).specifier
    assert "0.3.35" not in engine_requirement(run_requirements()).specifier


def test_they_are_installed_where_the_tests_run() -> None:
    assert are_met(run_requirements())


@pytest.mark.parametrize("text", ["no-such-package", "llama-cpp-python>=99", "packaging<1"])
def test_what_is_not_there_or_too_old_is_missing(text: str) -> None:
    assert not are_met([Requirement(text)])


def test_what_the_engine_asks_for_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is installed without its requirements first."""
    monkeypatch.setattr("importlib.metadata.requires", lambda name: ["no-such-package>=1", "other; extra == 'server'"])
    assert not are_met([Requirement(ENGINE)])
    monkeypatch.setattr("importlib.metadata.requires", lambda name: ["other; extra == 'server'"])
    assert are_met([Requirement(ENGINE)])
