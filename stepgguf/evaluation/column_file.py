"""The head of a column in stepgguf's own form, which holds rows of any length, in codes or small.

    "stepeval" | version uint32 = 1 | n_vocab int32 | top_k int32 | second_half int32 | n_rows int32 | n_name int32
    name, UTF-8 [n_name] | lengths of the rows int32 [n_rows] | their tokens int32 [sum of lengths]
    then the rows of each prediction that counts: of top_rows.py, or for top_k = 0 of coded_rows.py

All little endian, without padding. second_half is 1 if the predictions at t / 2 to t - 2 of a row of t tokens count, 0
if those at 0 to t - 2 do. The tokens are those of the text: a vocabulary's token that begins a sequence takes the place
of the first of a row when a model reads it.
"""

from __future__ import annotations

import struct

import numpy as np

from stepgguf.evaluation.columns import Column
from stepgguf.evaluation.reading import MOST_TOKENS, HeadReader

MAGIC = b"stepeval"
VERSION = 1
_NUMBERS = struct.Struct("<I5i")
_MOST_NAME = 1000


def encode_head(column: Column, n_vocab: int, top_k: int) -> bytes:
    """Return the head of a column."""
    name = column.name.encode()
    numbers = _NUMBERS.pack(VERSION, n_vocab, top_k, column.second_half, len(column.rows), len(name))
    lengths, tokens = np.array([len(row) for row in column.rows], "<i4"), np.concatenate(column.rows).astype("<i4")
    return MAGIC + numbers + name + lengths.tobytes() + tokens.tobytes()


def read_head(reader: HeadReader) -> tuple[Column, int, int]:
    """Read what follows the magic: the column, n_vocab and top_k. EvaluationError if it is damaged."""
    version, n_vocab, top_k, second_half, n_rows, n_name = _NUMBERS.unpack(reader.take(_NUMBERS.size))
    if version != VERSION:
        raise reader.damaged(f"version {version}, and this stepgguf reads version {VERSION}")
    sizes_can_be = 1 <= n_vocab <= MOST_TOKENS and 0 <= top_k <= n_vocab and n_rows >= 1 and n_name <= _MOST_NAME
    if not sizes_can_be or second_half not in (0, 1):
        raise reader.damaged(f"{n_rows} rows of the {top_k} most likely of {n_vocab} tokens")
    name = reader.take(n_name).decode(errors="replace")
    lengths = reader.numbers(n_rows)
    if lengths.min() < 2:
        raise reader.damaged(f"a row of {lengths.min()} tokens")
    tokens = reader.tokens(int(lengths.sum(dtype=np.int64)), n_vocab)
    rows = np.split(tokens, np.cumsum(lengths)[:-1])
    return Column(name, tuple(rows), second_half=bool(second_half)), n_vocab, top_k
