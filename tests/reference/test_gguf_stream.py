"""A stream on a GGUF is the stream on its checkpoint: same keys, norms stored whole, RoPE factors as a tensor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from stepgguf.cli.main import main
from stepgguf.convert.sources.full_hparams import full_hparams
from stepgguf.convert.sources.opening import open_source
from stepgguf.reference.stream import LayerStream
from stepgguf.reference.token_rows import TokenRows
from stepgguf.reference.weights import WeightReader

pytestmark = pytest.mark.slow
ROWS = TokenRows.of(np.random.default_rng(0).integers(3, 700, (2, 90)).astype(np.int32))


@contextmanager
def stream(path: Path, folder: Path) -> Iterator[LayerStream]:
    with open_source(path) as source:
        yield LayerStream(WeightReader(source, full_hparams(source), torch.device("cpu")), ROWS, folder)


def convert(checkpoint: Path, folder: Path, type: str) -> Path:
    path = folder / f"{type}.gguf"
    assert main(["convert", str(checkpoint), str(path), "-t", type, "-q"]) == 0
    return path


def run(path: Path, folder: Path) -> tuple[torch.Tensor, np.ndarray]:
    """The trunk's logits, and what leaves the last MTP block."""
    with stream(path, folder) as running:
        running.run_trunk()
        logits = torch.cat([part for _, part in running.logits()])
        running.run_mtp()
        return logits, running.folder.states(8).copy()


@pytest.fixture(scope="module")
def expected(small: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.Tensor, np.ndarray]:
    """What the checkpoint gives."""
    return run(small, tmp_path_factory.mktemp("expected"))


def test_an_f32_gguf_gives_the_checkpoints_logits_and_states(
    small: Path, expected: tuple[torch.Tensor, np.ndarray], tmp_path: Path
) -> None:
    """The weights are the same numbers, so only float32 rounding of RoPE's factors can differ."""
    logits, states = expected
    again, states_again = run(convert(small, tmp_path, "F32"), tmp_path / "b")
    assert (again - logits).abs().max() <= 1e-5 * logits.abs().max()
    assert np.abs(states_again - states).max() <= 1e-5 * np.abs(states).max()


def test_a_quantized_gguf_is_near_them(small: Path, expected: tuple[torch.Tensor, np.ndarray], tmp_path: Path) -> None:
    """Q8_0 has a rounding error of 0.4 % of a block's largest weight; another tensor or row would be 100 % off."""
    states = expected[1]
    found = run(convert(small, tmp_path, "Q8_0"), tmp_path / "b")[1]
    assert 0 < np.square(found - states).mean() < 0.01 * np.square(states).mean()


def test_another_source_does_not_go_on_with_a_folder(small: Path, tmp_path: Path) -> None:
    run(small, tmp_path / "a")
    with stream(convert(small, tmp_path, "Q8_0"), tmp_path / "a") as running:
        assert running.folder.last_states() == -1
        with pytest.raises(FileNotFoundError):
            running.folder.states(8)
