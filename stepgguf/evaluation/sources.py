"""Who says what comes next: the evaluated file and the reference alike.

A source is asked once, for all rows of all columns: to stream a checkpoint past them costs one read of it, however many
they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from stepgguf.evaluation.columns import ScoredRow
from stepgguf.evaluation.softmax import Floats


class LogitSource(Protocol):
    """A model that gives logits."""

    name: str
    n_vocab: int

    def logits(self, rows: Sequence[ScoredRow]) -> Iterator[Floats]:
        """Yield the logits of the predictions that count, float32 [n, n_vocab], in the order of the rows.

        A row gives one block or several; no block has predictions of two rows. A block holds until the next is asked
        for.
        """
        ...
