"""The evaluation itself: the reference's predictions into a file, then the evaluated file's against them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from typing import BinaryIO

import numpy as np

from stepgguf.errors import EvaluationError
from stepgguf.evaluation.columns import Column, ScoredRow
from stepgguf.evaluation.matching import another_vocabulary
from stepgguf.evaluation.reference_file import KeptColumn, RowForm, slabs, write_reference
from stepgguf.evaluation.scores import Scores
from stepgguf.evaluation.softmax import Floats
from stepgguf.evaluation.sources import LogitSource

Progress = Callable[[int], None]  # told how many predictions are done since


def keep_reference(
    file: BinaryIO,
    source: LogitSource,
    columns: Sequence[Column],
    form: RowForm,
    begin: int | None,
    progress: Progress,
) -> None:
    """Write what a source says of the columns to a file. begin: the token that begins a sequence, if there is one."""
    if source.n_vocab != form.n_vocab:
        raise another_vocabulary(source.name, source.n_vocab, form.n_vocab)
    with closing(_finite_logits(source, columns, begin)) as logits:
        for n in write_reference(file, columns, form, logits):
            progress(n)


def score_columns(
    source: LogitSource, kept: Sequence[KeptColumn], begin: int | None, progress: Progress
) -> Iterator[Scores]:
    """Yield the scores of a source against each column of a reference of the same vocabulary."""
    with closing(_finite_logits(source, [column.column for column in kept], begin)) as logits:
        for column in kept:
            yield Scores.joined(list(_score_column(column, logits, progress)))


def _score_column(kept: KeptColumn, logits: Iterator[Floats], progress: Progress) -> Iterator[Scores]:
    targets, done = kept.column.targets, 0
    while done < len(targets):
        block = next(logits)
        for part in slabs(len(block), kept.form.n_vocab):
            rows = kept.read(done + part.start, part.stop - part.start)
            yield kept.form.compare(rows, block[part], targets[done:][part])
        done += len(block)
        progress(len(block))


def _finite_logits(source: LogitSource, columns: Sequence[Column], begin: int | None) -> Generator[Floats, None, None]:
    """A source's logits of all columns, block after block. EvaluationError if one is no number.

    To be closed before the source: an engine's context must not outlive its model.
    """
    rows: list[ScoredRow] = [row for column in columns for row in column.scored_rows(begin)]
    for block in source.logits(rows):
        if not np.isfinite(block).all():
            raise EvaluationError(
                f"{source.name}: the model gives logits that are no numbers",
                hint="Check the file with `stepgguf verify`.",
            )
        yield block
