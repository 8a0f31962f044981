"""The head of llama-perplexity's base file (--kl-divergence-base), which holds one column in rows of 16-bit codes.

    "_logits_" | n_ctx int32 | n_vocab int32 | n_chunk int32 | tokens int32 [n_chunk, n_ctx]
    then for each chunk the rows (coded_rows.py) of the predictions at n_ctx / 2 to n_ctx - 2

All little endian, without padding. The tokens are those of the text: the one that begins a sequence is not in them.
llama-perplexity reads so many rows as the head says, and nothing behind them.
"""

from __future__ import annotations

import struct

import numpy as np

from stepgguf.evaluation.columns import Column, Tokens, text_name
from stepgguf.evaluation.reading import MOST_TOKENS, HeadReader

MAGIC = b"_logits_"
_NUMBERS = struct.Struct("<3i")


def encode_head(column: Column, n_vocab: int) -> bytes:
    """Return the head for a column whose rows have one length and count in their second half."""
    tokens = np.stack(column.rows).astype("<i4")
    return MAGIC + _NUMBERS.pack(column.n_ctx, n_vocab, len(column.rows)) + tokens.tobytes()


def read_head(reader: HeadReader) -> tuple[Column, int]:
    """Read what follows the magic: the column and n_vocab. EvaluationError if it is damaged."""
    n_ctx, n_vocab, n_chunk = _NUMBERS.unpack(reader.take(_NUMBERS.size))
    if n_ctx < 4 or not 1 <= n_vocab <= MOST_TOKENS or n_chunk < 1:
        raise reader.damaged(f"a context of {n_ctx}, {n_vocab} tokens in the vocabulary, {n_chunk} chunks")
    rows: Tokens = reader.tokens(n_ctx * n_chunk, n_vocab).reshape(n_chunk, n_ctx)
    return Column(text_name(n_ctx), tuple(rows), second_half=True), n_vocab
