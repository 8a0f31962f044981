"""A conversation with one engine: messages, prompt, deltas, and what was counted."""

from __future__ import annotations

import time
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

from stepgguf.chat.output import Delta, OutputMachine
from stepgguf.chat.template import ChatTemplate, normalize
from stepgguf.errors import BadMetadata
from stepgguf.runtime.engine import Engine, Generation, Sampling

_CLOSE_THINKING = "\n</think>\n"


@dataclass(slots=True)
class Usage:
    """Tokens and seconds of one answer. n_context: how much of the context is in use after it."""

    n_prompt: int = 0
    n_cached: int = 0
    n_reasoning: int = 0
    n_text: int = 0
    n_context: int = 0
    prompt_seconds: float = 0.0
    answer_seconds: float = 0.0
    finish_reason: str | None = None
    budget_reached: bool = False

    @property
    def tokens_per_second(self) -> float:
        return (self.n_reasoning + self.n_text) / self.answer_seconds if self.answer_seconds else 0.0


@dataclass
class Session:
    """Ask, iterate over the deltas, ask again. An answer that is cut short stays in the history as far as it came."""

    engine: Engine
    sampling: Sampling
    max_tokens: int | None = None
    reasoning_budget: int | None = None
    tools: list[dict[str, Any]] | None = None
    messages: list[dict[str, Any]] = field(default_factory=list)
    usage: Usage = field(default_factory=Usage)

    def __post_init__(self) -> None:
        source = self.engine.info.chat_template
        if source is None:
            raise BadMetadata(
                f"{self.engine.info.name} has no chat template", hint="Add one: stepgguf template FILE.gguf NEW.jinja"
            )
        self._template = ChatTemplate(source)
        self._end_of_thinking = self.engine.token_id("</think>")

    def ask(self, question: str) -> Generator[Delta, None, None]:
        """Add a user message and stream the answer."""
        self.messages.append({"role": "user", "content": question})
        try:
            yield from self.answer()
        except BaseException:
            if self.messages[-1]["role"] == "user":  # nothing was answered: the question can be asked again
                self.messages.pop()
            raise

    def answer(self) -> Generator[Delta, None, None]:
        """Stream an answer to the messages as they are, and append it to them."""
        prompt_text = self._template.render(normalize(self.messages), tools=self.tools)
        prompt = self.engine.tokenize(prompt_text)
        thinking = prompt_text.rstrip().endswith("<think>")
        machine = OutputMachine(self._end_of_thinking if thinking else None)
        generation = self.engine.generate(prompt, self.sampling, self.max_tokens)
        usage = self.usage = Usage(n_prompt=len(prompt))
        parts: dict[str, list[str]] = {"reasoning": [], "text": []}
        started = first = time.monotonic()
        try:
            if thinking and self.reasoning_budget == 0:
                self._stop_thinking(generation, usage)
            for step in generation:
                if not machine.n_reasoning and not machine.n_text:
                    first = time.monotonic()
                for delta in machine.feed(step.token_id, step.piece):
                    parts[delta.kind].append(delta.text)
                    yield delta
                if machine.kind == "reasoning" and machine.n_reasoning == self.reasoning_budget:
                    self._stop_thinking(generation, usage)
            for delta in machine.close():
                parts[delta.kind].append(delta.text)
                yield delta
        finally:
            usage.n_cached = self.engine.n_cached
            usage.n_reasoning, usage.n_text = machine.n_reasoning, machine.n_text
            usage.n_context = usage.n_prompt + usage.n_reasoning + usage.n_text
            usage.prompt_seconds, usage.answer_seconds = first - started, time.monotonic() - first
            usage.finish_reason = generation.finish_reason
            if parts["reasoning"] or parts["text"]:
                text, reasoning = "".join(parts["text"]), "".join(parts["reasoning"])
                self.messages.append({"role": "assistant", "content": text, "reasoning_content": reasoning})

    def _stop_thinking(self, generation: Generation, usage: Usage) -> None:
        if not usage.budget_reached:
            usage.budget_reached = True
            generation.force(self.engine.tokenize_piece(_CLOSE_THINKING))
