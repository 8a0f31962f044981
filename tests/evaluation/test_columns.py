"""What is evaluated: pieces of a text, random tokens, dialogues."""

from __future__ import annotations

import numpy as np
import pytest

from stepgguf.errors import EvaluationError
from stepgguf.evaluation.columns import dialogue_column, random_column, require_predictions, text_column


def test_a_text_is_cut_into_pieces_whose_second_half_counts() -> None:
    column = text_column(range(100, 125), 8)
    assert [row.tolist() for row in column.rows] == [list(range(s, s + 8)) for s in (100, 108, 116)]
    assert column.n_scored == 3 * 3
    assert column.targets.tolist() == [105, 106, 107, 113, 114, 115, 121, 122, 123]
    assert {row.first for row in column.scored_rows(None)} == {4}


def test_a_model_reads_the_beginning_token_and_the_column_keeps_what_stood_there() -> None:
    column = text_column(range(100, 116), 8)
    read = [row.tokens.tolist() for row in column.scored_rows(7)]
    assert read == [[7, *range(101, 108)], [7, *range(109, 116)]]
    assert column.rows[1][0] == 108


def test_of_a_dialogue_every_prediction_counts() -> None:
    column = dialogue_column([[1, 2, 3], [4, 5, 6, 7]])
    assert column.targets.tolist() == [2, 3, 5, 6, 7]
    assert [row.n_scored for row in column.scored_rows(None)] == [2, 3]


def test_random_tokens_are_the_same_every_time_and_even_over_the_vocabulary() -> None:
    one, two = (random_column(50, 512, 8) for _ in range(2))
    assert all(map(np.array_equal, one.rows, two.rows))
    counts = np.bincount(np.concatenate(one.rows), minlength=50)
    # chi-squared with 49 degrees of freedom: above 94.6 in one of 10,000 draws, and this draw is fixed
    assert ((counts - 4096 / 50) ** 2 / (4096 / 50)).sum() < 94.6


def test_too_little_text_is_refused() -> None:
    with pytest.raises(EvaluationError, match="15 tokens, and a context of 8 needs at least 16"):
        text_column(range(15), 8)
    with pytest.raises(EvaluationError, match="3 predictions, and statistics need at least 100"):
        require_predictions(dialogue_column([[1, 2, 3, 4]]))
