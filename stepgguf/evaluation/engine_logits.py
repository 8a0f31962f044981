"""Logits of a GGUF as llama.cpp computes them, in the shapes that llama-perplexity decodes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from stepgguf.errors import EngineDied
from stepgguf.evaluation.columns import ScoredRow
from stepgguf.evaluation.softmax import Floats
from stepgguf.runtime.llama.context import DecodeRows, LlamaContext
from stepgguf.runtime.llama.model import LlamaModel

BATCH = 512  # tokens of a decode: llama-perplexity's own, and what bounds the memory for logits


class EngineLogits:
    """The logits of a loaded GGUF. threads: of a decode."""

    def __init__(self, model: LlamaModel, threads: int) -> None:
        self._model, self._threads = model, threads
        self.name, self.n_vocab = model.path.name, model.n_vocab

    def logits(self, rows: Sequence[ScoredRow]) -> Iterator[Floats]:
        """See LogitSource. The blocks are views of llama.cpp's memory."""
        longest = max(len(row.tokens) for row in rows)
        batch = min(BATCH, longest)
        context = LlamaContext(
            self._model, n_ctx=longest, n_seq=1, n_batch=batch, n_outputs=batch, threads=self._threads
        )
        try:
            for row in rows:
                context.remove(0, 0)
                for start in range(0, len(row.tokens), batch):
                    yield from self._decode(context, row, start, batch)
        finally:
            context.close()

    def _decode(self, context: LlamaContext, row: ScoredRow, start: int, batch: int) -> Iterator[Floats]:
        """Decode a part of a row. Its last token is decoded as llama-perplexity does, though nothing comes after it."""
        tokens = row.tokens[start : start + batch]
        n_outputs = min(len(tokens), max(0, start + len(tokens) - row.first))
        code = context.decode([DecodeRows(0, start, tokens.tolist(), n_outputs)])
        if code != 0:
            raise EngineDied(f"{self._model.path}: llama_decode failed with code {code}", recovered=False)
        is_last = start + len(tokens) == len(row.tokens)
        n = n_outputs - is_last
        if n > 0:
            yield context.logits_of(len(tokens) - n_outputs, n)
