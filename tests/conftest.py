"""Fixtures that many tests share. Before anything loads numpy or torch: one thread for each product, since several
processes run tests at a time, and threads that wait for each other by spinning take the time of all."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")
os.environ["OPENBLAS_NUM_THREADS"] = os.environ.get("OPENBLAS_NUM_THREADS", "1")

import pytest

from stepgguf.cli.main import main
from stepgguf.demo import CHECKPOINT
from tests.generate import Shape, write_checkpoint
from tests.oracle import silence

# The command line in a process that Ctrl+C reaches even if the tests run in the background, where shells ignore it.
INTERRUPTIBLE = [
    sys.executable,
    "-c",
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from stepgguf.cli.main import run; run()",
]
DATA = Path(__file__).parent / "data"


def real_config(version: str = "3.5") -> dict[str, Any]:
    """The published config.json of Step-3.5-Flash or Step-3.7-Flash."""
    config: dict[str, Any] = json.loads((DATA / f"step-{version}-flash-config.json").read_text())
    return config


@pytest.fixture(scope="session", autouse=True)
def _silent_llama() -> None:
    silence()


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BF16 checkpoint of 5 layers and 3 MTP blocks. Read-only: copy it to change it."""
    return write_checkpoint(tmp_path_factory.mktemp("small") / "small", Shape(n_mtp=3))


@pytest.fixture(scope="session")
def small_fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as block-FP8, with an index as stale as the official one. Read-only."""
    return write_checkpoint(tmp_path_factory.mktemp("small-fp8") / "small", Shape(n_mtp=3), fp8=True, index=True)


@pytest.fixture(scope="session")
def demo_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model in BF16, window 64. Read-only."""
    path = tmp_path_factory.mktemp("embedded") / "demo.gguf"
    assert main(["convert", str(CHECKPOINT), str(path), "-t", "BF16", "-q"]) == 0
    return path


@pytest.fixture(scope="session")
def separate_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model in BF16 without its MTP blocks, which are in mtp-demo.gguf beside it. Read-only."""
    path = tmp_path_factory.mktemp("separate") / "demo.gguf"
    assert main(["convert", str(CHECKPOINT), str(path), "-t", "BF16", "--mtp", "separate", "-q"]) == 0
    return path
