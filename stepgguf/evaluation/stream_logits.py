"""Logits of a checkpoint in float32, read layer by layer, so that it need not fit in memory.

Rows of any length go into token rows of the longest one's, in their order, as documents that do not see each other:

    rows of 512, 512, 2048, 300      ->      [512 | 512 | padding], [2048], [300 | padding]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from stepgguf.convert.sources.checkpoint import Checkpoint
from stepgguf.evaluation.columns import ScoredRow
from stepgguf.evaluation.softmax import Floats
from stepgguf.reference.stream import LayerStream, Progress
from stepgguf.reference.token_rows import PADDING, TokenRows
from stepgguf.reference.weights import WeightReader


class StreamLogits:
    """The logits of a checkpoint. folder: for hidden states, which stay, so that what was interrupted goes on."""

    def __init__(self, checkpoint: Checkpoint, folder: Path, threads: int | None, progress: Progress) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self._reader = WeightReader(checkpoint, checkpoint.hparams, torch.device("cpu"))
        self._folder, self._progress = folder, progress
        self.name, self.n_vocab = checkpoint.name, checkpoint.hparams.vocab_size

    def logits(self, rows: Sequence[ScoredRow]) -> Iterator[Floats]:
        """See LogitSource. One block for each row, when all layers have run."""
        groups = group_rows(rows)
        stream = LayerStream(self._reader, token_rows(groups), self._folder, progress=self._progress)
        stream.run_trunk()
        for part, block in stream.logits():
            for group, logits in zip(groups[part], block, strict=True):
                yield from _scored(group, logits.numpy())


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


def _scored(group: Sequence[ScoredRow], logits: Floats) -> Iterator[Floats]:
    """The predictions that count of each row of a group, of its logits [tokens, n_vocab]."""
    start = 0
    for row in group:
        yield logits[start + row.first : start + len(row.tokens) - 1]
        start += len(row.tokens)
