"""From files of text and of dialogues to columns, in the tokens of the evaluated model.

Plain texts are joined to one. There is always a column of random tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from stepgguf.calibration.source_tokenizer import DIALOGUES, SourceTokenizer
from stepgguf.evaluation.columns import Column, dialogue_column, random_column, require_predictions, text_column

HELD_OUT = Path(__file__).parent / "texts"  # written for this project, and in no text for calibration
RANDOM_ROWS = 8


def default_texts() -> list[Path]:
    """Return the texts that come with the package: prose in ten languages, code, mathematics, dialogues with tools."""
    return sorted(HELD_OUT.iterdir())


def make_columns(
    tokenizer: SourceTokenizer, paths: Sequence[Path], contexts: Sequence[int], n_rows: int | None
) -> tuple[Column, ...]:
    """Return the columns of a text: one for each context, the random tokens, and the dialogues if there are any.

    n_rows: so many rows of each at most. TextError if a file cannot be read, EvaluationError if there is too little.
    """
    chats = [path for path in paths if path.suffix == DIALOGUES]
    columns = list(_text_columns(tokenizer, [path for path in paths if path not in chats], contexts))
    columns.append(random_column(tokenizer.n_vocab, contexts[0], RANDOM_ROWS))
    if chats:
        begin = tokenizer.begin_ids
        columns.append(dialogue_column([*begin, *tokens] for path in chats for tokens in tokenizer.dialogues(path)))
    columns = [column.cut(n_rows) for column in columns]
    for column in columns:
        require_predictions(column)
    return tuple(columns)


def _text_columns(tokenizer: SourceTokenizer, paths: Sequence[Path], contexts: Sequence[int]) -> Iterator[Column]:
    if not paths:
        return
    tokens = list(tokenizer.begin_ids)
    for path in paths:
        tokens += tokenizer.plain_text(path)
    for n_ctx in contexts:
        yield text_column(tokens, n_ctx)
