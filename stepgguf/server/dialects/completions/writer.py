"""Answers as Completions sends them.

stream   echo   chunk*   [usage]   [DONE]         one echo per answer, empty unless asked for
whole    the same deltas, folded
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import cast

from stepgguf.chat.exchange import Reply
from stepgguf.chat.output import Delta
from stepgguf.runtime.engine import Step
from stepgguf.server.dialects.completions.shapes import TextChoice, TextCompletion, TextLogprobs
from stepgguf.server.dialects.openai import DONE, FinishReason, usage_of
from stepgguf.server.dialects.openai_errors import OpenAIErrorForm
from stepgguf.server.generation import AnswerPart
from stepgguf.server.http.sse import JsonEvent, Record
from stepgguf.server.problem import Problem
from stepgguf.server.service import AnswerHead

COMPLETION_ERRORS = OpenAIErrorForm(prompt_field="prompt")


class CompletionWriter:
    """Writes answers as text_completion objects. See dialects/writer.py for the protocol.

    echoes: the texts with which the answers begin, one for each. n_prompt: tokens of all prompts. n_top: how many
    alternatives to each token are sent; None: no logprobs.
    """

    def __init__(
        self, head: AnswerHead, echoes: Sequence[str], n_prompt: int, *, n_top: int | None, with_usage: bool
    ) -> None:
        self._head, self._echoes, self._n_prompt, self._n_top = head, echoes, n_prompt, n_top
        self._with_usage = with_usage
        self._offsets = [len(echo) for echo in echoes]  # of each answer's text so far, where logprobs say it goes on
        self._unfinished = list(range(len(echoes)))  # answers without a finish_reason so far

    def start(self) -> list[Record]:
        return [self._chunk(index, echo) for index, echo in enumerate(self._echoes)]

    def feed(self, part: AnswerPart) -> list[Record]:
        text = "".join(delta.text for delta in part.deltas)
        logprobs = self._logprobs(_steps(part.deltas), self._offsets[part.index])
        self._offsets[part.index] += len(text)
        if part.finish_reason is not None:
            self._unfinished.remove(part.index)
        return [self._chunk(part.index, text, logprobs, cast("FinishReason | None", part.finish_reason))]

    def finish(self, replies: Sequence[Reply]) -> list[Record]:
        if not self._with_usage:
            return [DONE]
        return [JsonEvent({**self._completion([]), "usage": usage_of(replies, self._n_prompt)}), DONE]

    def fail(self, problem: Problem) -> list[Record]:
        """Give the error, and an end for each answer that has none: clients which pass over the error see that it was
        cut short."""
        ends = [self._chunk(index, "", None, "length") for index in self._unfinished]
        return [JsonEvent(COMPLETION_ERRORS.body(problem, self._head.trace_id)), *ends, DONE]

    def whole(self, answers: Sequence[Sequence[Delta]], replies: Sequence[Reply]) -> TextCompletion:
        choices = [self._choice(i, *one) for i, one in enumerate(zip(self._echoes, answers, replies, strict=True))]
        return {**self._completion(choices), "usage": usage_of(replies, self._n_prompt)}

    def _choice(self, index: int, echo: str, deltas: Sequence[Delta], reply: Reply) -> TextChoice:
        return {
            "index": index,
            "text": echo + "".join(delta.text for delta in deltas),
            "logprobs": self._logprobs(_steps(deltas), len(echo)),
            "finish_reason": cast(FinishReason, reply.finish_reason),
        }

    def _chunk(
        self, index: int, text: str, logprobs: TextLogprobs | None = None, reason: FinishReason | None = None
    ) -> JsonEvent:
        choice: TextChoice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        return JsonEvent(self._completion([choice]))

    def _completion(self, choices: list[TextChoice]) -> TextCompletion:
        return {
            "id": f"cmpl-{self._head.trace_id}",
            "object": "text_completion",
            "created": self._head.created,
            "model": self._head.model,
            "system_fingerprint": self._head.fingerprint,
            "choices": choices,
        }

    def _logprobs(self, steps: Sequence[Step], offset: int) -> TextLogprobs | None:
        if self._n_top is None:
            return None
        tokens = [step.piece.decode(errors="replace") for step in steps]
        offsets = list(accumulate(map(len, tokens), initial=offset))[:-1]  # where each token begins
        return {
            "tokens": tokens,
            "token_logprobs": [step.logprob or 0.0 for step in steps],
            "top_logprobs": [_top_logprobs(step) for step in steps],
            "text_offset": offsets,
        }


def _steps(deltas: Sequence[Delta]) -> list[Step]:
    return [step for delta in deltas for step in delta.steps]


def _top_logprobs(step: Step) -> dict[str, float]:
    """Return the likeliest tokens, and the one that was taken if it is not among them."""
    alternatives = [(top.piece, top.logprob) for top in step.top]
    taken = [(step.piece, step.logprob)] if step.logprob is not None else []
    return {piece.decode(errors="replace"): logprob for piece, logprob in [*alternatives, *taken]}
