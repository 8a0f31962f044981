"""Rows of tokens for the language model: its tokenizer, what it learns from, what it is calibrated and measured on.

A row is BOS and what follows in a stream of documents, each ended by END_OF_SENTENCE.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, models, trainers

from benchmarks.language_text import OTHER_CHARACTERS, documents, limited_texts, other_documents
from stepgguf.demo import tokenizer
from stepgguf.errors import StepggufError
from stepgguf.files import folders

Tokens = npt.NDArray[np.int32]

FOLDER = folders.cache() / "language-model"
VOCABULARY = 4096
BOS_ID, END_ID = 0, 1
TOKENIZER_CHARACTERS = 8_000_000  # of the training text, enough for 4,096 tokens


def held_out_rows(kind: str, n: int, t: int, folder: Path = FOLDER) -> Tokens:
    """int32 [n, t], each row BOS and t - 1 tokens of text that training never saw, of the "same" kind or an "other".

    Rows of the other kind come from its sources in turn. StepggufError if the text is too short for n rows.
    """
    encoder = load_tokenizer(folder)
    if kind == "same":
        return first_rows(rows(stream(encoder, (d.read() for d in documents("held-out"))), t), n)
    texts = (limited_texts(source, OTHER_CHARACTERS) for source in other_documents())
    each = [rows(stream(encoder, source), t) for source in texts]
    least = min(map(len, each))
    return first_rows(np.stack([source[:least] for source in each], axis=1).reshape(-1, t), n)


def calibration_rows(n: int, t: int, folder: Path = FOLDER) -> Tokens:
    """int32 [n, t], rows of the kind of text that was learnt, from documents neither learnt nor held out."""
    texts = (document.read() for document in documents("calibration"))
    return first_rows(rows(stream(load_tokenizer(folder), texts), t), n)


def load_tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "checkpoint" / "tokenizer.json"))


def stream(encoder: Tokenizer, texts: Iterable[str]) -> Tokens:
    """The tokens of all texts in one row, END_ID after each."""
    encoded = encoder.encode_batch_fast(list(texts), add_special_tokens=False)
    return np.concatenate([np.array([*text.ids, END_ID], np.int32) for text in encoded])


def rows(tokens: Tokens, t: int) -> Tokens:
    """The stream cut into rows [n, t] that each begin with BOS, shuffled, always in the same way."""
    pieces = tokens[: len(tokens) // (t - 1) * (t - 1)].reshape(-1, t - 1)
    order = np.random.default_rng(0).permutation(len(pieces))
    return np.pad(pieces[order], ((0, 0), (1, 0)), constant_values=BOS_ID)


def first_rows(found: Tokens, n: int) -> Tokens:
    """The first n rows. StepggufError if there are fewer."""
    if n > len(found):
        raise StepggufError(
            f"The text has {len(found)} rows of {found.shape[1]} tokens, not {n}.", hint="Ask for less."
        )
    return found[:n]


def train_tokenizer() -> str:
    """The text of tokenizer.json: byte-level BPE of the training text, with the family's layout and special tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = tokenizer.pre_tokenizer()
    size = VOCABULARY - tokenizer.N_FIXED + len(tokenizer.ALPHABET)
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=tokenizer.ALPHABET, show_progress=False)
    bpe.train_from_iterator(limited_texts(documents("training"), TOKENIZER_CHARACTERS), trainer)
    return tokenizer.tokenizer_json(merges_of(bpe))


def merges_of(bpe: Tokenizer) -> list[tuple[str, str]]:
    """The merges of a BPE tokenizer, in their order."""
    return [(first, second) for first, second in json.loads(bpe.to_str())["model"]["merges"]]
