"""Which columns of a reference file are evaluated, and whether they are those of the text that was given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from stepgguf.errors import EvaluationError
from stepgguf.evaluation.columns import RANDOM, Column, require_predictions
from stepgguf.evaluation.reference_file import KeptColumn

_MAKE_HINT = "Make a reference of what you ask for with --against MODEL --base FILE, or ask for what it has."


def require_vocabulary(kept: Sequence[KeptColumn], n_vocab: int) -> None:
    """Raise EvaluationError if a column is of another vocabulary than the evaluated file's."""
    for column in kept:
        if column.form.n_vocab != n_vocab:
            raise another_vocabulary(str(column.path), column.form.n_vocab, n_vocab)


def another_vocabulary(name: str, found: int, expected: int) -> EvaluationError:
    """Return the error of a reference `name` whose vocabulary is not the evaluated file's."""
    return EvaluationError(
        f"{name}: a vocabulary of {found:,} tokens, and the evaluated file has {expected:,}",
        hint="Give a reference of the same model.",
    )


def columns_of_contexts(kept: Sequence[KeptColumn], contexts: Sequence[int]) -> list[KeptColumn]:
    """Return the columns with these contexts and those that are no text. EvaluationError if a context is not there."""
    texts = {column.column.n_ctx for column in kept if column.column.is_text}
    missing = [n_ctx for n_ctx in contexts if n_ctx not in texts]
    if missing:
        others = f", but of {' and '.join(map(str, sorted(texts)))}" if texts else ", and none of another"
        raise EvaluationError(f"{kept[0].path}: has no text of context {missing[0]}{others}", hint=_MAKE_HINT)
    return [column for column in kept if not column.column.is_text or column.column.n_ctx in contexts]


def columns_of_text(kept: Sequence[KeptColumn], wanted: Sequence[Column]) -> list[KeptColumn]:
    """Return the columns that are among the wanted ones, and the random tokens, which are of no text.

    EvaluationError if their tokens differ, or there is none.
    """
    by_name = {column.name: column for column in wanted if column.name != RANDOM}
    found = [column for column in kept if column.column.name in by_name]
    if not found:
        names = ", ".join(column.column.name for column in kept)
        raise EvaluationError(f"{kept[0].path}: has none of the columns asked for, but {names}", hint=_MAKE_HINT)
    for column in found:
        _require_same_tokens(column, by_name[column.column.name])
    return [column for column in kept if column in found or column.column.name == RANDOM]


def cut_columns(kept: Sequence[KeptColumn], n_rows: int | None) -> list[KeptColumn]:
    """Return the columns with their first n_rows rows; None is all. EvaluationError if too few predictions are left."""
    cut = [replace(column, column=column.column.cut(n_rows)) for column in kept]
    for column in cut:
        require_predictions(column.column)
    return cut


def _require_same_tokens(kept: KeptColumn, wanted: Column) -> None:
    """EvaluationError if a row that both have differs. Either may have more rows."""
    for number, (has, expected) in enumerate(zip(kept.column.rows, wanted.rows, strict=False)):
        if np.array_equal(has, expected):
            continue
        place = next((i for i, (a, b) in enumerate(zip(has, expected, strict=False)) if a != b), None)
        found = f"row {number} has {len(has)} tokens, and of the text it has {len(expected)}"
        if place is not None:
            found = f"token {place} of row {number} is {has[place]}, and of the text it is {expected[place]}"
        raise EvaluationError(
            f"{kept.path}: {kept.column.name}: {found}",
            hint="It is of another text or of another tokenizer. Give that text with --text, or none.",
        )
