"""Logits of a checkpoint as the torch reference computes them, in float32."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from stepgguf.convert.sources.checkpoint import Checkpoint
from stepgguf.evaluation.columns import ScoredRow
from stepgguf.evaluation.softmax import Floats
from stepgguf.reference.load import load_reference


class CheckpointLogits:
    """The logits of a checkpoint that fits in memory."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._model = load_reference(checkpoint)
        self.name, self.n_vocab = checkpoint.name, checkpoint.hparams.vocab_size

    def logits(self, rows: Sequence[ScoredRow]) -> Iterator[Floats]:
        """See LogitSource. One block for each row."""
        for row in rows:
            with torch.inference_mode():
                hidden = self._model.hidden(torch.from_numpy(row.tokens[None].astype("int64")))
                block: Floats = self._model.logits(hidden[:, row.first : -1])[0].numpy()
            yield block
