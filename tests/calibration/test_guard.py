"""Guard tokens among the rows of a text."""

from __future__ import annotations

import numpy as np
import pytest

from stepgguf.calibration.guard import with_guard
from stepgguf.calibration.held_out import held_out_tokens
from stepgguf.reference.token_rows import TokenRows

VOCABULARY = 4096


def text(n_rows: int, length: int = 64) -> TokenRows:
    return TokenRows.of(np.full((n_rows, length), 5, np.int32))


@pytest.mark.parametrize("n_rows", [1, 5, 16, 100])
def test_a_text_keeps_its_rows_and_has_one_guard_token_for_sixteen(n_rows: int) -> None:
    rows = with_guard(text(n_rows), VOCABULARY)
    assert rows.guard.sum() == n_rows * 64 // 16
    assert (rows.tokens[rows.text & ~rows.guard] == 5).all()
    assert rows.n_tokens == n_rows * (64 + 4)
    assert not (rows.predicted & rows.guard).any()
    assert not (held_out_tokens(rows) & rows.guard).any()


def test_guard_tokens_are_even_over_the_vocabulary_and_always_the_same() -> None:
    rows = with_guard(text(2000), VOCABULARY)
    tokens = rows.tokens[rows.guard]
    counts = np.histogram(tokens, 8, (0, VOCABULARY))[0]
    assert np.abs(counts - len(tokens) / 8).max() < 5 * (len(tokens) / 8) ** 0.5
    assert with_guard(text(2000), VOCABULARY).digest == rows.digest
