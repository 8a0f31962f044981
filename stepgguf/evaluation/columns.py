"""What a file is evaluated on: columns, each with rows of tokens and with figures of its own.

    text          the tokens of a text in pieces of n_ctx; what is left at the end is dropped   second half of each row
    random        token ids drawn uniformly: unlike anything that calibration shows            second half of each row
    dialogues     one row for each dialogue, whole                                              all of each row

Each row is read from an empty context, its first token replaced by the one that begins a sequence where the vocabulary
adds one. The prediction at position i is of token i + 1. In llama-perplexity's rule, which the first two follow, those
of positions n_ctx / 2 to n_ctx - 2 count: every prediction then has seen at least half of the context.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from stepgguf.errors import EvaluationError

Tokens = npt.NDArray[np.int32]

MIN_PREDICTIONS = 100  # llama-perplexity's own limit: fewer say nothing about quantiles
RANDOM_SEED = 20261127
RANDOM = "random tokens"


@dataclass(frozen=True, eq=False, slots=True)
class ScoredRow:
    """Tokens [t] as a model reads them, from an empty context; the predictions at first to t - 2 count."""

    tokens: Tokens
    first: int

    @property
    def n_scored(self) -> int:
        """How many predictions count."""
        return len(self.tokens) - 1 - self.first


@dataclass(frozen=True, eq=False, slots=True)
class Column:
    """Rows of tokens, [t] each, as the text has them. second_half: llama-perplexity's rule; else all predictions
    count."""

    name: str
    rows: tuple[Tokens, ...]
    second_half: bool

    @property
    def n_scored(self) -> int:
        """How many predictions count, in all rows."""
        return sum(self.row_lengths)

    @property
    def n_ctx(self) -> int:
        """The length of the longest row."""
        return max(map(len, self.rows), default=0)

    @property
    def is_text(self) -> bool:
        """Whether it is a text in pieces of one length."""
        return self.name == text_name(self.n_ctx)

    @property
    def targets(self) -> Tokens:
        """The tokens that are predicted, [n_scored]."""
        return np.concatenate([row[self.first(row) + 1 :] for row in self.rows])

    def first(self, row: Tokens) -> int:
        """Return the first position of a row whose prediction counts."""
        return len(row) // 2 if self.second_half else 0

    def scored_rows(self, begin: int | None) -> Iterable[ScoredRow]:
        """Yield the rows as a model reads them. begin: the token that begins a sequence, where there is one."""
        for row in self.rows:
            read = row.copy()
            if begin is not None:
                read[0] = begin
            yield ScoredRow(read, self.first(row))

    @property
    def row_lengths(self) -> list[int]:
        """How many predictions count in each row."""
        return [len(row) - 1 - self.first(row) for row in self.rows]

    def cut(self, n_rows: int | None) -> Column:
        """Return the column with its first n_rows rows; None is all."""
        return replace(self, rows=self.rows[:n_rows])


def text_name(n_ctx: int) -> str:
    """Return the name of the column of a text in pieces of n_ctx."""
    return f"text, context {n_ctx}"


def text_column(tokens: Sequence[int], n_ctx: int) -> Column:
    """Cut the tokens of a text into rows as llama-perplexity does. EvaluationError if they are fewer than 2 n_ctx."""
    if len(tokens) < 2 * n_ctx:
        raise EvaluationError(
            f"the text has {len(tokens):,} tokens, and a context of {n_ctx:,} needs at least {2 * n_ctx:,}",
            hint="Give more text with --text, or a smaller --ctx.",
        )
    n_rows = len(tokens) // n_ctx
    rows = np.array(tokens[: n_rows * n_ctx], np.int32).reshape(n_rows, n_ctx)
    return Column(text_name(n_ctx), tuple(rows), second_half=True)


def random_column(n_vocab: int, n_ctx: int, n_rows: int) -> Column:
    """Draw n_rows rows of token ids, each id of the vocabulary with the same probability; the same at every call."""
    rows = np.random.default_rng(RANDOM_SEED).integers(n_vocab, size=(n_rows, n_ctx), dtype=np.int32)
    return Column(RANDOM, tuple(rows), second_half=True)


def dialogue_column(dialogues: Iterable[Sequence[int]]) -> Column:
    """Take each dialogue's tokens as a row of which all predictions count."""
    return Column("dialogues", tuple(np.array(tokens, np.int32) for tokens in dialogues), second_half=False)


def require_predictions(column: Column) -> None:
    """Raise EvaluationError for a column that is too short for statistics."""
    if column.n_scored < MIN_PREDICTIONS:
        raise EvaluationError(
            f"{column.name}: {column.n_scored} predictions, and statistics need at least {MIN_PREDICTIONS}",
            hint="Give more text, or more --chunks.",
        )
