"""Logits of a checkpoint or a GGUF in float32, read layer by layer, so that it need not fit in memory.

Rows of any length go into token rows of the longest one's, in their order, as documents that do not see each other:

    rows of 512, 512, 2048, 300      ->      [512 | 512 | padding], [2048], [300 | padding]

Of a quantized GGUF that is what its weights lose: activations stay as they are, where llama.cpp makes 8-bit blocks of
them for each product.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from stepgguf.convert.sources.full_hparams import full_hparams
from stepgguf.convert.sources.source import TensorSource
from stepgguf.evaluation.columns import ScoredRow
from stepgguf.evaluation.softmax import Floats
from stepgguf.reference.stream import LayerStream, Progress
from stepgguf.reference.token_rows import PADDING, TokenRows
from stepgguf.reference.weights import WeightReader


class StreamLogits:
    """The logits of an opened source. folder: for hidden states, which stay, so that what was interrupted goes on."""

    def __init__(self, source: TensorSource, device: torch.device, folder: Path, progress: Progress) -> None:
        self.hp = full_hparams(source).without_mtp()
        self._reader = WeightReader(source, self.hp, device)
        self._folder, self._progress = folder, progress
        self.name, self.n_vocab = str(source.path), self.hp.vocab_size

    def logits(self, rows: Sequence[ScoredRow]) -> Iterator[Floats]:
        """See LogitSource. Nothing is yielded before all layers have run."""
        groups = group_rows(rows)
        stream = LayerStream(self._reader, token_rows(groups), self._folder, progress=self._progress)
        stream.run_trunk()
        for (some_rows, tokens), block in stream.logits():
            for group, logits in zip(groups[some_rows], block, strict=True):
                yield from _scored(group, tokens.start, logits.cpu().numpy())


def group_rows(rows: Sequence[ScoredRow]) -> list[list[ScoredRow]]:
    """Group consecutive rows, each group no longer than the longest row."""
    longest = max(len(row.tokens) for row in rows)
    groups: list[list[ScoredRow]] = []
    room = 0
    for row in rows:
        if room < len(row.tokens):
            groups.append([])
            room = longest
        groups[-1].append(row)
        room -= len(row.tokens)
    return groups


def token_rows(groups: Sequence[Sequence[ScoredRow]]) -> TokenRows:
    """Make a token row of each group, and of each of its rows a document."""
    longest = max(len(row.tokens) for group in groups for row in group)
    tokens = np.zeros((len(groups), longest), np.int32)
    documents = np.full((len(groups), longest), PADDING, np.int32)
    for i, group in enumerate(groups):
        text = np.concatenate([row.tokens for row in group])
        tokens[i, : len(text)] = text
        documents[i, : len(text)] = np.repeat(np.arange(len(group)), [len(row.tokens) for row in group])
    return TokenRows(tokens, documents)


def _scored(group: Sequence[ScoredRow], at: int, logits: Floats) -> Iterator[Floats]:
    """The predictions that count of each row of a group, of the logits [n, n_vocab] of its tokens from `at` on."""
    begin = 0
    for row in group:
        start, stop = begin + row.first, begin + len(row.tokens) - 1
        here = logits[max(0, start - at) : max(0, stop - at)]
        if len(here):
            yield here
        begin += len(row.tokens)
