"""What a reference said, kept in a file: columns behind each other, each with a head and a row for each prediction.

    head of the first column | rows     llama-perplexity's base file, if rows are coded and the column is a text
    head of the next         | rows     stepgguf's own (column_file.py)
    ...

So a reference with all its logits is a file that llama-perplexity reads: it stops where its own column ends. Rows have
one size, and are read and written a few at a time: of the real vocabulary one row of codes has 257,800 bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Protocol

import numpy as np

from stepgguf.errors import EvaluationError
from stepgguf.evaluation import base_file, column_file
from stepgguf.evaluation.coded_rows import CodedRows, Records
from stepgguf.evaluation.columns import Column, Tokens
from stepgguf.evaluation.reading import HeadReader
from stepgguf.evaluation.scores import Scores
from stepgguf.evaluation.softmax import Floats
from stepgguf.evaluation.top_rows import TopRows
from stepgguf.files import disk

SLAB_VALUES = 2**22  # logits that are worked on at once: 16 MiB in float32


class RowForm(Protocol):
    """How the reference's distributions are kept. top_k: the tokens that are kept one by one; 0: all, in codes."""

    n_vocab: int
    top_k: int
    dtype: np.dtype[np.void]

    def encode(self, logits: Floats, targets: Tokens) -> Records: ...

    def compare(self, rows: Records, logits: Floats, targets: Tokens) -> Scores: ...


def row_form(n_vocab: int, top_k: int) -> RowForm:
    """Return the form with the top_k most likely tokens, 0 for all."""
    return TopRows(n_vocab, top_k) if top_k else CodedRows(n_vocab)


def reference_bytes(columns: Sequence[Column], form: RowForm) -> int:
    """Return the bytes of the rows of all columns."""
    return sum(column.n_scored for column in columns) * form.dtype.itemsize


def slabs(n: int, n_vocab: int) -> Iterator[slice]:
    """Cut n rows of logits into parts that are worked on at once."""
    step = max(1, SLAB_VALUES // n_vocab)
    return (slice(start, min(start + step, n)) for start in range(0, n, step))


def write_reference(
    file: BinaryIO, columns: Sequence[Column], form: RowForm, logits: Iterator[Floats]
) -> Iterator[int]:
    """Write what a reference says of the columns. Yields how many predictions were written, whenever some were.

    logits: blocks [n, n_vocab] of all predictions that count, in the order of the columns and their rows; no block has
    rows of two columns.
    """
    for i, column in enumerate(columns):
        file.write(_encode_head(column, form, is_first=i == 0))
        targets, done = column.targets, 0
        while done < len(targets):
            block = next(logits)
            for part in slabs(len(block), form.n_vocab):
                file.write(form.encode(block[part], targets[done:][part]).tobytes())
            done += len(block)
            yield len(block)


def _encode_head(column: Column, form: RowForm, *, is_first: bool) -> bytes:
    if is_first and column.is_text and not form.top_k:  # what it reads is a text, which has no name there
        return base_file.encode_head(column, form.n_vocab)
    return column_file.encode_head(column, form.n_vocab, form.top_k)


@dataclass(frozen=True, eq=False, slots=True)
class KeptColumn:
    """A column of the reference file at `path`: its rows begin at byte `offset`."""

    file: BinaryIO
    path: Path
    column: Column
    form: RowForm
    offset: int

    @property
    def end(self) -> int:
        """The byte behind its rows."""
        return self.offset + self.column.n_scored * self.form.dtype.itemsize

    def read(self, start: int, n: int) -> Records:
        """Read the rows of n predictions from number `start` on."""
        size = self.form.dtype.itemsize
        buffer = bytearray(n * size)
        disk.read_at(self.file.fileno(), buffer, self.offset + start * size, str(self.path), EvaluationError)
        return np.frombuffer(buffer, self.form.dtype)


class ReferenceFile:
    """A reference file that is open for reading. Use as a context manager."""

    def __init__(self, path: Path) -> None:
        """Read the heads of all columns. EvaluationError if the file is none, is damaged or ends too early."""
        try:
            self._file = disk.open_regular(path)
        except OSError as error:
            raise EvaluationError(f"{path}: {error.strerror}", hint="Give a reference that can be read.") from error
        try:
            self.columns = tuple(_read_columns(HeadReader(self._file, path)))
        except BaseException:
            self._file.close()
            raise
        self.n_vocab = self.columns[0].form.n_vocab

    def __enter__(self) -> ReferenceFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def _read_columns(reader: HeadReader) -> Iterator[KeptColumn]:
    while not (position := reader.file.tell()) or position < reader.size:
        kept = _read_column(reader)
        if kept.end > reader.size:
            raise reader.truncated(kept.end)
        yield kept
        reader.file.seek(kept.end)


def _read_column(reader: HeadReader) -> KeptColumn:
    magic, top_k = reader.file.read(len(base_file.MAGIC)), 0
    if magic == base_file.MAGIC:
        column, n_vocab = base_file.read_head(reader)
    elif magic == column_file.MAGIC:
        column, n_vocab, top_k = column_file.read_head(reader)
    else:
        raise EvaluationError(
            f"{reader.path}: no reference: a column begins with {magic!r}, expected {base_file.MAGIC!r} or "
            f"{column_file.MAGIC!r}",
            hint="Give a checkpoint, a GGUF, or what `--base` or llama-perplexity wrote.",
        )
    return KeptColumn(reader.file, reader.path, column, row_form(n_vocab, top_k), reader.file.tell())


def is_reference(path: Path) -> bool:
    """Whether a file begins as a reference file does."""
    try:
        with disk.open_regular(path) as file:
            return file.read(len(base_file.MAGIC)) in (base_file.MAGIC, column_file.MAGIC)
    except OSError:
        return False
