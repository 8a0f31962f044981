"""Rows of tokens, as a model reads them at once: the sequences of one length that calibration and evaluation run."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

PADDING = -1  # the document of a position that holds nothing
GUARD = -2  # the document of tokens beside the text (calibration/guard.py): they run, and their predictions are no loss


@dataclass(frozen=True, eq=False, slots=True)
class TokenRows:
    """n rows of t tokens. A token sees those before it in its row that are of the same document.

    tokens: [n, t] int32. documents: [n, t] int32; PADDING where a row holds nothing, GUARD where it holds no text.
    """

    tokens: NDArray[np.int32]
    documents: NDArray[np.int32]

    @classmethod
    def of(cls, tokens: NDArray[np.int32]) -> TokenRows:
        """Rows [n, t] that are one document each."""
        return cls(tokens, np.zeros_like(tokens))

    def __getitem__(self, rows: slice) -> TokenRows:
        """Some of the rows."""
        return TokenRows(self.tokens[rows], self.documents[rows])

    @property
    def n_rows(self) -> int:
        return len(self.tokens)

    @property
    def row_length(self) -> int:
        """Tokens of a row, padding included."""
        return int(self.tokens.shape[1])

    @property
    def digest(self) -> str:
        """SHA-256 of tokens and documents."""
        return hashlib.sha256(self.tokens.tobytes() + self.documents.tobytes()).hexdigest()

    @property
    def text(self) -> NDArray[np.bool_]:
        """Where tokens are, and no padding, [n, t]."""
        text: NDArray[np.bool_] = self.documents != PADDING
        return text

    @property
    def guard(self) -> NDArray[np.bool_]:
        """Where tokens are that are no text, [n, t]."""
        guard: NDArray[np.bool_] = self.documents == GUARD
        return guard

    @property
    def predicted(self) -> NDArray[np.bool_]:
        """Where the next token of the row is of the same document, so that a prediction of it can be judged, [n, t]."""
        following = np.full_like(self.documents, PADDING)
        following[:, :-1] = self.documents[:, 1:]
        predicted: NDArray[np.bool_] = self.text & ~self.guard & (self.documents == following)
        return predicted

    @property
    def n_tokens(self) -> int:
        """Tokens of text."""
        return int(np.count_nonzero(self.text))
