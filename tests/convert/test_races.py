"""Two converters on one destination: whenever the second comes, one makes the file and the other is told why not."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stepgguf.cli.main import main
from tests.convert.racers import PLACES
from tests.generate import Shape, write_checkpoint

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


@pytest.fixture(scope="module")
def whole(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The digests of the files that one process alone makes."""
    folder = tmp_path_factory.mktemp("whole")
    assert main(["convert", str(tiny), str(folder / "x.gguf"), "-t", "BF16", "--name", "x", "-q"]) == 0
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def pairs(outcomes: list[dict[str, Any]], place: list[str] | None) -> Iterator[dict[str, Any]]:
    found = [outcome for outcome in outcomes if outcome["place"] == place]
    assert found
    yield from found


def check(outcome: dict[str, Any], whole: dict[str, str]) -> None:
    assert sorted(outcome["codes"]) == [0, 1], outcome
    made, refused = sorted(zip(outcome["codes"], outcome["errors"], strict=True))
    assert made[1] == ""
    assert "x.gguf is in use: another stepgguf is writing it" in refused[1] or "x.gguf exists" in refused[1], outcome
    assert "Traceback" not in refused[1]
    assert outcome["files"] == whole


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("place", PLACES)
def test_a_process_that_is_held_up_anywhere(
    place: str, when: str, outcomes: list[dict[str, Any]], whole: dict[str, str]
) -> None:
    for outcome in pairs(outcomes, [place, when]):
        check(outcome, whole)


def test_pairs_that_start_at_the_same_moment(outcomes: list[dict[str, Any]], whole: dict[str, str]) -> None:
    for outcome in pairs(outcomes, None):
        check(outcome, whole)
