"""Texts to calibrate with, as rows of tokens: plain text cut as llama-imatrix cuts it, dialogues packed whole.

    notes.txt      begin + tokens of the whole text, cut into rows; each row's first token becomes `begin`;
                   what is left at the end is dropped
    chats.jsonl    each dialogue is a document that starts with `begin`; a row holds as many as find room, which do not
                   see each other, and a longer one is cut into several documents

Rows of several files alternate, so that the first rows have something of each.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from stepgguf.calibration.source_tokenizer import DIALOGUES, SourceTokenizer
from stepgguf.convert.sources.source import TensorSource
from stepgguf.errors import TextError
from stepgguf.reference.token_rows import PADDING, TokenRows

DEFAULT_TEXTS = Path(__file__).parent / "texts"  # written for this project
_OPEN_ROWS = 64  # that a dialogue may still go into


def default_texts() -> list[Path]:
    """The texts that come with the package: prose in several languages, mathematics, code, dialogues with tools."""
    return sorted(path for path in DEFAULT_TEXTS.iterdir() if path.suffix in (".txt", DIALOGUES))


class TextReader:
    """Reads texts as rows of `length` tokens of a source's model. Errors are SourceTokenizer's."""

    def __init__(self, source: TensorSource, length: int) -> None:
        self._tokenizer, self._length = SourceTokenizer(source), length

    def read(self, paths: Sequence[Path]) -> TokenRows:
        """The rows of some files. TextError, which names file and line, for what cannot be used."""
        return alternate([self._dialogues(p) if p.suffix == DIALOGUES else self._plain_text(p) for p in paths])

    def _plain_text(self, path: Path) -> TokenRows:
        begin = self._tokenizer.begin_ids
        tokens = [*begin, *self._tokenizer.plain_text(path)]
        n = len(tokens) // self._length
        if n == 0:
            raise TextError(
                f"{path}: {len(tokens)} tokens, and a chunk has {self._length} tokens",
                hint="Give a longer text; `stepgguf imatrix` takes a smaller --chunk, too.",
            )
        rows = np.array(tokens[: n * self._length], np.int32).reshape(n, self._length)
        rows[:, : len(begin)] = begin
        return TokenRows.of(rows)

    def _dialogues(self, path: Path) -> TokenRows:
        begin, documents = self._tokenizer.begin_ids, list[list[int]]()
        for tokens in self._tokenizer.dialogues(path):
            documents += _cut(tokens, begin, self._length)
        return pack_documents(documents, self._length)


def _cut(tokens: Sequence[int], begin: Sequence[int], length: int) -> Iterator[list[int]]:
    """A dialogue as documents of at most `length` tokens, each with `begin` in front."""
    step = length - len(begin)
    return ([*begin, *tokens[start : start + step]] for start in range(0, len(tokens), step))


def pack_documents(documents: Iterable[Sequence[int]], length: int) -> TokenRows:
    """Rows of whole documents: each goes into the first of the latest rows that has room for it."""
    rows: list[list[Sequence[int]]] = []
    room: list[int] = []
    for document in documents:
        latest = range(max(0, len(rows) - _OPEN_ROWS), len(rows))
        row = next((i for i in latest if room[i] >= len(document)), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(length)
        rows[row].append(document)
        room[row] -= len(document)
    tokens, numbers = np.zeros((len(rows), length), np.int32), np.full((len(rows), length), PADDING, np.int32)
    for i, row_documents in enumerate(rows):
        text = [token for document in row_documents for token in document]
        tokens[i, : len(text)] = text
        numbers[i, : len(text)] = np.repeat(np.arange(len(row_documents)), list(map(len, row_documents)))
    return TokenRows(tokens, numbers)


def alternate(parts: Sequence[TokenRows]) -> TokenRows:
    """The rows of several texts in one order, each text's spread evenly over all."""
    places = np.concatenate([(np.arange(part.n_rows) + 0.5) / part.n_rows for part in parts])
    order = np.argsort(places, kind="stable")
    tokens, documents = (
        np.concatenate([getattr(part, name) for part in parts])[order] for name in ("tokens", "documents")
    )
    return TokenRows(tokens, documents)
