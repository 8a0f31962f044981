"""Guard tokens: random ones that run beside a text, so that codes are not bought with what the model does elsewhere.

Codes that are chosen for what a text gives to a matrix may lose on everything else. Guard tokens stand for that: they
are in no sum that codes are chosen by, and no loss is theirs; but codes must not have a larger error on them than
stock codes (code_search.py). Random tokens are as unlike a text as tokens can be.
"""

from __future__ import annotations

import numpy as np

from stepgguf.calibration.text import alternate
from stepgguf.reference.token_rows import GUARD, PADDING, TokenRows

TEXT_TOKENS = 16  # for each guard token
_SEED = 16  # not that of any tokens that files are measured on


def with_guard(rows: TokenRows, vocab_size: int) -> TokenRows:
    """The rows of a text, and among them some of guard tokens, the last of which may be padded."""
    n_tokens = max(1, rows.n_tokens // TEXT_TOKENS)
    shape = (-(-n_tokens // rows.row_length), rows.row_length)
    tokens = np.random.default_rng(_SEED).integers(0, vocab_size, shape, np.int32)
    documents = np.full(shape, GUARD, np.int32)
    documents.ravel()[n_tokens:] = PADDING
    return alternate([rows, TokenRows(tokens, documents)])
