"""A conversation: what was said, how answers are to be made, and one answer after the other. No terminal in here.

    ask(text) -> Queued? Prefill* Delta* AnswerUsage      with `tick`: None whenever nothing came for so long

A ChatBackend makes the answers: a model in this process (inprocess.py) or a running server (remote.py). What happens
goes to the transcript at once, and an answer that was cut short stays as far as it came: nothing that was read is lost.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import asdict, replace
from typing import Any, Protocol

from stepgguf.chat.messages import ChatMessage
from stepgguf.chat.output import Delta
from stepgguf.conversation.records import AnswerOrigin, AnswerUsage, ChatSettings, ConversationEntry
from stepgguf.conversation.transcript import SavedSession, Transcript
from stepgguf.errors import OutputError, StepggufError
from stepgguf.runtime.engine import Prefill, Queued, Sampling

SAVE_PART_SECONDS = 5.0  # an answer under way is saved so often
_MODEL_FIELDS = ("role", "content", "reasoning_content", "tool_calls", "tool_call_id")  # of a message; others are ours

Progress = Queued | Prefill | Delta  # what comes of an answer before its end
Update = Progress | AnswerUsage
Updates = Generator[Update | None, None, None]  # None: nothing came for as long as the caller wanted to wait


class ChatGeneration(Protocol):
    """One answer under way. The methods are quick and may be called after its end."""

    @property
    def usage(self) -> AnswerUsage:
        """The counts up to now; the same object from start to end."""

    def next_updates(self, seconds: float | None) -> list[Progress] | None:
        """Return what came; nothing if it did not come within so many seconds (None: wait); None after the end.

        Raises what ended the answer, if that was an error."""

    def end_reasoning(self) -> bool:
        """Have the model stop reasoning and answer now. False: this backend cannot, or there is no reasoning."""

    def cancel(self) -> None:
        """Have it end soon."""

    def close(self) -> None:
        """Cancel it if it still runs, and wait for its end. `usage` is final then."""


class ChatBackend(Protocol):
    """What answers. n_ctx and default_sampling: None if the backend does not tell."""

    @property
    def origin(self) -> AnswerOrigin:
        """What sessions with it are marked with."""

    @property
    def n_ctx(self) -> int | None:
        """The longest context, in tokens."""

    @property
    def default_sampling(self) -> Sampling | None:
        """What holds where the settings say nothing."""

    def count_tokens(self, text: str) -> int | None:
        """Return how many tokens a text has, None if it cannot be told."""

    def start_answer(self, messages: Sequence[ChatMessage], settings: ChatSettings) -> ChatGeneration:
        """Begin an answer to these messages. Raises what can be refused before anything runs."""


class Session:
    """A conversation: ask, iterate over the updates, ask again.

    entries: what was said so far. usage: of the answer that came last or is coming. transcript: where it is saved; None
    if it is not, or no longer can be.
    """

    def __init__(
        self, backend: ChatBackend, settings: ChatSettings | None = None, transcript: Transcript | None = None
    ) -> None:
        self.backend, self.settings, self.transcript = backend, settings or ChatSettings(), transcript
        self.entries: list[ConversationEntry] = []
        self.usage = AnswerUsage(n_ctx=backend.n_ctx)
        self._generation: ChatGeneration | None = None
        self._save_record(self.settings_record())

    @classmethod
    def resume(cls, backend: ChatBackend, saved: SavedSession, transcript: Transcript | None) -> Session:
        """Go on where a saved session stopped, with its settings."""
        session = cls(backend, saved.settings)
        session.entries, session.transcript = list(saved.entries), transcript
        if usage := next((entry.usage for entry in reversed(saved.entries) if entry.usage), None):
            session.usage = replace(usage, n_ctx=backend.n_ctx)
        return session

    @property
    def messages(self) -> list[ChatMessage]:
        """What the model gets: all that was said, with the system message in front."""
        system = [{"role": "system", "content": self.settings.system}] if self.settings.system else []
        return [*system, *({k: v for k, v in e.message.items() if k in _MODEL_FIELDS} for e in self.entries)]

    @property
    def open_calls(self) -> list[dict[str, Any]]:
        """Tool calls of the last answer that have no result yet."""
        for i in range(len(self.entries) - 1, -1, -1):  # back over the results to the answer that they belong to
            message = self.entries[i].message
            if message["role"] == "assistant":
                done = {entry.message.get("tool_call_id") for entry in self.entries[i + 1 :]}
                return [call for call in message.get("tool_calls", ()) if call["id"] not in done]
            if message["role"] != "tool":
                break
        return []

    def close(self) -> None:
        """Let others write to the transcript."""
        if self.transcript is not None:
            self.transcript.close()

    def change_settings(self, settings: ChatSettings) -> None:
        """Use other settings from here on."""
        self.settings = settings
        self._save_record(self.settings_record())

    def ask(self, question: str, tick: float | None = None) -> Updates:
        """Add a user message and stream the answer. If none comes at all, the question is taken back."""
        n = len(self.entries)
        try:
            self._add_entry(ConversationEntry({"role": "user", "content": question}))
            yield from self.answer(tick)
        finally:
            if len(self.entries) == n + 1:  # no answer was added
                self._cut_entries(n)

    def answer(self, tick: float | None = None) -> Updates:
        """Stream an answer to the messages as they are. Closing the iterator ends it as `stop_answer` does."""
        self.usage = AnswerUsage(n_ctx=self.backend.n_ctx)
        generation = self._generation = self.backend.start_answer(self.messages, self.settings)
        self.usage = generation.usage
        collected = _CollectedAnswer()
        saved, end = time.monotonic(), "cancelled"  # unless it ends otherwise; the engine may be done before its reader
        try:
            while (updates := generation.next_updates(tick)) is not None:
                for update in updates:
                    if isinstance(update, Delta):
                        collected.add_delta(update)
                if time.monotonic() - saved > SAVE_PART_SECONDS:
                    saved = time.monotonic()
                    part = collected.next_part()
                    if any(part.values()):
                        self._save_record({"type": "part", **part})
                yield from updates
                if not updates and tick is not None:
                    yield None  # the caller looks after its keyboard
            end = self.usage.finish_reason
        except StepggufError:
            end = "error"
            raise
        finally:
            # also when the caller has closed the iterator: what came by then is an answer that was cut short
            self._generation = None
            generation.close()
            self.usage.reasoning_seconds = collected.reasoning_seconds
            self.usage.finish_reason = end
            if collected:
                interrupted = end in ("cancelled", "error")
                self._add_entry(ConversationEntry(collected.to_message(), replace(self.usage), interrupted))
        yield self.usage

    def end_reasoning(self) -> bool:
        """Have the model stop reasoning and answer. False: nothing is being answered, or the backend cannot."""
        return self._generation is not None and self._generation.end_reasoning()

    def stop_answer(self) -> None:
        """End the answer that is coming; its updates end soon."""
        if self._generation is not None:
            self._generation.cancel()

    def give_result(self, call_id: str, text: str) -> None:
        """Add the result of a tool call. When all have theirs, `answer` goes on."""
        self._add_entry(ConversationEntry({"role": "tool", "tool_call_id": call_id, "content": text}))

    def undo(self) -> str | None:
        """Take the last question and what came after it back. Returns the question, None if there was none."""
        n = self._last_question()
        if n is None:
            return None
        question: str = self.entries[n].message["content"]
        self._cut_entries(n)
        return question

    def regenerate(self, tick: float | None = None) -> Updates:
        """Answer the last question anew, and stream that."""
        n = self._last_question()
        if n is not None:
            self._cut_entries(n + 1)
            yield from self.answer(tick)

    def _last_question(self) -> int | None:
        questions = [i for i, entry in enumerate(self.entries) if entry.message["role"] == "user"]
        return questions[-1] if questions else None

    def _cut_entries(self, n: int) -> None:
        del self.entries[n:]
        self._save_record({"type": "cut", "n": n})

    def _add_entry(self, entry: ConversationEntry) -> None:
        self.entries.append(entry)
        self._save_record(entry.to_record())

    def _save_record(self, record: dict[str, object]) -> None:
        """Save a record. OutputError: it cannot be saved, and nothing is from there on; the conversation can go on."""
        if self.transcript is None:
            return
        try:
            self.transcript.append(record)
        except OutputError:
            self.close()
            self.transcript = None
            raise

    def settings_record(self) -> dict[str, object]:
        """Return the settings as they are saved."""
        return {"type": "settings", **asdict(self.settings)}


class _CollectedAnswer:
    """Collects the deltas of an answer into one message."""

    def __init__(self) -> None:
        self.reasoning_seconds = 0.0
        self._parts: dict[str, list[str]] = {"reasoning": [], "text": []}
        self._n_saved = {"reasoning": 0, "text": 0}  # parts that `next_part` has given already
        self._calls: list[dict[str, Any]] = []
        self._started: float | None = None

    def __bool__(self) -> bool:
        return bool(self._parts["reasoning"] or self._parts["text"] or self._calls)

    def add_delta(self, delta: Delta) -> None:
        """Add what came. The time up to the last reasoning is the time of reasoning."""
        now = time.monotonic()
        self._started = self._started or now
        if delta.kind == "reasoning":
            self.reasoning_seconds = now - self._started
        if delta.kind == "call":
            function = {"name": delta.text, "arguments": ""}
            # the id only has to be another for each call: the template does not show it
            self._calls.append({"id": f"call_{time.time_ns():x}", "type": "function", "function": function})
        elif delta.kind == "arguments":
            self._calls[-1]["function"]["arguments"] += delta.text
        else:
            self._parts[delta.kind].append(delta.text)

    def next_part(self) -> dict[str, str]:
        """Return what came since it was called last."""
        part = {kind: "".join(texts[self._n_saved[kind] :]) for kind, texts in self._parts.items()}
        self._n_saved = {kind: len(texts) for kind, texts in self._parts.items()}
        return part

    def to_message(self) -> ChatMessage:
        """Return the answer as far as it has come."""
        message: dict[str, object] = {"role": "assistant", "content": "".join(self._parts["text"])}
        if self._parts["reasoning"]:
            message["reasoning_content"] = "".join(self._parts["reasoning"])
        if self._calls:
            message["tool_calls"] = self._calls
        return message
