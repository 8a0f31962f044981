"""The small form: 0 for an identical file, never above the divergence over all tokens, and that in the limit."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from stepgguf.errors import EvaluationError
from stepgguf.evaluation.columns import Column, dialogue_column, random_column
from stepgguf.evaluation.reference_file import ReferenceFile, row_form, write_reference
from stepgguf.evaluation.scores import Scores
from stepgguf.evaluation.softmax import Floats
from stepgguf.evaluation.top_rows import TopRows

N_VOCAB = 300
SIZES = (1, 2, 7, 50, 299, 300, 1000)


def pair(seed: int) -> tuple[Floats, Floats, NDArray[np.int32]]:
    """Logits of a reference and of a file, [60, N_VOCAB], between nearly certain and nearly even, and the targets."""
    rng = np.random.default_rng(seed)
    reference = rng.normal(size=(60, N_VOCAB)) * np.geomspace(0.1, 12, 60)[:, None]
    file = reference + rng.normal(size=reference.shape) * rng.choice([0.01, 0.3, 3], size=(60, 1))
    targets = rng.integers(N_VOCAB, size=60, dtype=np.int32)
    return reference.astype(np.float32), file.astype(np.float32), targets


def scores(reference: Floats, file: Floats, targets: NDArray[np.int32], top_k: int) -> Scores:
    form = TopRows(N_VOCAB, top_k)
    return form.compare(form.encode(reference, targets), file, targets)


def true_divergence(reference: Floats, file: Floats) -> NDArray[np.float64]:
    p, q = (torch.log_softmax(torch.from_numpy(x).double(), dim=-1) for x in (reference, file))
    found: NDArray[np.float64] = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1).numpy()
    return found


@pytest.mark.parametrize("top_k", SIZES)
def test_an_identical_file_scores_exactly_zero(top_k: int) -> None:
    reference, _, targets = pair(0)
    reference[3] = 1.0  # all alike
    reference[4, ::2] = reference[4].max()  # a tie of many
    found = scores(reference, reference.copy(), targets, top_k)
    assert not found.kld.any()
    assert not found.delta_p.any()
    assert found.same_top.all()
    assert np.array_equal(found.nll, found.nll_base)


@pytest.mark.parametrize("seed", range(3))
def test_it_is_a_lower_bound_that_grows_with_k_up_to_the_divergence_over_all_tokens(seed: int) -> None:
    reference, file, targets = pair(seed)
    exact = true_divergence(reference, file)
    found = np.array([scores(reference, file, targets, top_k).kld for top_k in range(1, N_VOCAB + 1, 13)])
    # ln p and ln q are float32 numbers of up to 80: each is off by 4e-6, and so is their difference by up to 1e-5.
    assert (found <= exact + 1e-5).all()
    # With another K the sets of tokens are nested, so a finer partition never says less.
    assert (np.diff(found, axis=0) >= -1e-5).all()
    assert scores(reference, file, targets, N_VOCAB).kld == pytest.approx(exact, abs=1e-5)
    assert (found[0] < 0.9 * exact).any()


def test_everything_else_does_not_depend_on_k() -> None:
    reference, file, targets = pair(1)
    one, most = (scores(reference, file, targets, top_k) for top_k in (1, N_VOCAB))
    for name in ("nll", "nll_base", "delta_p", "same_top"):
        assert np.array_equal(getattr(one, name), getattr(most, name)), name
    assert np.array_equal(one.same_top, reference.argmax(-1) == file.argmax(-1))
    p = torch.log_softmax(torch.from_numpy(reference).double(), dim=-1)
    assert one.nll_base == pytest.approx(-p[torch.arange(60), targets].numpy(), abs=1e-5)


def columns() -> list[Column]:
    return [random_column(N_VOCAB, 16, 3), dialogue_column([[5, 6, 7, 8], list(range(40))])]


def write(path: Path, top_k: int = 4) -> Path:
    """Three columns' rows of normally distributed logits."""
    rng = np.random.default_rng(0)
    parts = columns()
    blocks = (rng.normal(size=(row.n_scored, N_VOCAB)).astype(np.float32) for c in parts for row in c.scored_rows(None))
    with path.open("wb") as file:
        assert sum(write_reference(file, parts, row_form(N_VOCAB, top_k), blocks)) == sum(c.n_scored for c in parts)
    return path


@pytest.mark.parametrize("top_k", [0, 4])
def test_a_file_keeps_several_columns_of_rows_of_any_length(tmp_path: Path, top_k: int) -> None:
    with ReferenceFile(write(tmp_path / "small", top_k)) as reference:
        for kept, column in zip(reference.columns, columns(), strict=True):
            assert kept.column.second_half == column.second_half
            assert all(map(np.array_equal, kept.column.rows, column.rows))
            assert kept.form.top_k == top_k
        last = reference.columns[-1]
        assert last.column.name == "dialogues"
        assert np.array_equal(last.read(0, 42)[40:], last.read(40, 2))


def test_the_head_is_as_documented(tmp_path: Path) -> None:
    data = write(tmp_path / "small").read_bytes()
    file = io.BytesIO(data)
    assert file.read(8) == b"stepeval"
    version, n_vocab, top_k, second_half, n_rows, n_name = struct.unpack("<I5i", file.read(24))
    assert (version, n_vocab, top_k, second_half, n_rows) == (1, N_VOCAB, 4, 1, 3)
    assert file.read(n_name) == b"random tokens"
    assert struct.unpack("<3i", file.read(12)) == (16, 16, 16)
    assert np.array_equal(np.frombuffer(file.read(4 * 48), "<i4"), np.concatenate(columns()[0].rows))
    file.read(3 * 7 * (4 * 4 + 4 * 4 + 4 + 4 + 4))  # of the 16 tokens those at 8 to 14 predict
    assert file.read(8) == b"stepeval"


@pytest.mark.parametrize(
    ("offset", "value", "words"),
    [
        (8, 2, "version 2"),
        (16, 301, "301 most likely of 300"),
        (20, 7, "rows of the"),
        (28, -1, "a length of -1"),
        (45, 1, "a row of 1 tokens"),
        (57, 300, "token 300"),
    ],
)
def test_a_damaged_head_is_refused(tmp_path: Path, offset: int, value: int, words: str) -> None:
    data = bytearray(write(tmp_path / "small").read_bytes())
    data[offset : offset + 4] = struct.pack("<i", value)
    (tmp_path / "small").write_bytes(data)
    with pytest.raises(EvaluationError, match=words):
        ReferenceFile(tmp_path / "small")


def test_any_cut_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "small")
    data = path.read_bytes()
    ends = {len(data)}
    with ReferenceFile(path) as reference:
        ends |= {column.end for column in reference.columns}
    for size in range(0, len(data), 13):
        path.write_bytes(data[:size])
        if size not in ends:
            with pytest.raises(EvaluationError):
                ReferenceFile(path)
