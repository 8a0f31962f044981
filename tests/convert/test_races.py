"""Two converters on one destination: whenever the second comes, one makes the file and the other is told why not."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stepgguf.cli.main import main
from tests.convert.racers import KILLED, MOMENTS, SPLIT
from tests.generate import Shape, write_checkpoint

pytestmark = pytest.mark.slow

N_PAIRS = 50


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = Shape(n_layer=2, n_dense=1, n_expert=4, dense=256, vocab=768)
    return write_checkpoint(tmp_path_factory.mktemp("races") / "tiny", shape)


@pytest.fixture(scope="module")
def outcomes(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "tests.convert.racers", str(tiny), str(tmp_path_factory.mktemp("races"))]
    result = subprocess.run([*command, str(N_PAIRS)], capture_output=True, text=True, check=True)
    return [json.loads(line) for line in result.stdout.splitlines()]


def made(tiny: Path, folder: Path, *options: str) -> dict[str, str]:
    """The digests of the files that one process alone makes."""
    assert main(["convert", str(tiny), str(folder / "x.gguf"), "-t", "BF16", "--name", "x", "-q", *options]) == 0
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return made(tiny, tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def split(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    files = made(tiny, tmp_path_factory.mktemp("split"), "--split-max-size", SPLIT)
    assert len(files) == 4  # two, with their manifests
    return files


def those(outcomes: list[dict[str, Any]], *what: str | int) -> list[dict[str, Any]]:
    found = [outcome for outcome in outcomes if outcome["what"] == list(what)]
    assert found
    return found


def check(outcome: dict[str, Any], whole: dict[str, str]) -> None:
    assert sorted(outcome["codes"]) == [0, 1], outcome
    made, refused = sorted(zip(outcome["codes"], outcome["errors"], strict=True))
    assert made[1] == ""
    assert "x.gguf is in use: another stepgguf is writing it" in refused[1] or "x.gguf exists" in refused[1], outcome
    assert "Traceback" not in refused[1]
    assert outcome["files"] == whole


@pytest.mark.parametrize(("place", "when"), MOMENTS)
def test_a_process_that_is_held_up_anywhere(
    place: str, when: str, outcomes: list[dict[str, Any]], whole: dict[str, str]
) -> None:
    for outcome in those(outcomes, "hold_up", place, when):
        check(outcome, whole)


def test_pairs_that_start_at_the_same_moment(outcomes: list[dict[str, Any]], whole: dict[str, str]) -> None:
    for outcome in those(outcomes, "race"):
        check(outcome, whole)


@pytest.mark.parametrize(("place", "when", "visit"), KILLED)
def test_a_process_that_is_killed_anywhere_is_finished_by_the_next(
    place: str, when: str, visit: int, outcomes: list[dict[str, Any]], split: dict[str, str]
) -> None:
    for outcome in those(outcomes, "kill", place, when, visit):
        if place == "let go" or (place, when) == ("remove the journal", "after"):
            assert outcome["codes"] == [-signal.SIGKILL, 1]  # it was done
            assert "exists" in outcome["errors"][1]
        else:
            assert outcome["codes"] == [-signal.SIGKILL, 0], outcome
        assert outcome["files"] == split
