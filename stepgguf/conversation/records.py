"""What a saved session consists of: how answers are made, what was said, what an answer took.

Each class has `from_record`, which takes a line of a file that may have been damaged or edited: what has another shape
raises that line's error, what is unknown is passed over, since a newer version may have written it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from stepgguf.chat.messages import ChatMessage
from stepgguf.files.jsonread import Value

# At each end of a model file, so much goes into its digest: to read 100 GB before a chat starts would be too slow.
_SAMPLE_BYTES = 2**20
_ROLES = ("user", "assistant", "tool")
_INT = 2**63 - 1

# The least and the most of each field of the sampling, and of max_tokens; whole numbers where those are.
SETTING_BOUNDS: Mapping[str, tuple[float, float]] = {
    "temperature": (0.0, math.inf),
    "top_k": (0, 2**31 - 1),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "frequency_penalty": (-math.inf, math.inf),
    "presence_penalty": (-math.inf, math.inf),
    "repetition_penalty": (0.0, math.inf),
    "seed": (-_INT, _INT),
    "max_tokens": (1, _INT),
}


@dataclass(frozen=True, slots=True)
class AnswerOrigin:
    """What answered, to tell whether a session goes on with the same model.

    digest: SHA-256 over the size and both ends of the model file. file may be a server's URL; then there is no digest.
    """

    model: str
    file: str
    size: int | None = None
    digest: str | None = None

    @classmethod
    def of_file(cls, model: str, path: Path) -> AnswerOrigin:
        """Describe a model's file, of which only both ends are read."""
        size = path.stat().st_size
        with path.open("rb") as file:
            digest = hashlib.sha256(b"%d " % size + file.read(_SAMPLE_BYTES))
            file.seek(max(_SAMPLE_BYTES, size - _SAMPLE_BYTES))
            digest.update(file.read())
        return cls(model, str(path.resolve()), size, digest.hexdigest())

    @classmethod
    def from_record(cls, value: Value) -> AnswerOrigin:
        """Read what a session's first line says."""
        size, digest = value.get("size"), value.get("digest")
        return cls(
            value["model"].text(),
            value["file"].text(),
            size.integer() if size else None,
            digest.text() if digest else None,
        )


@dataclass(frozen=True, slots=True)
class ChatSettings:
    """How answers are made. sampling: fields of Sampling that are not to be the backend's default.

    json: an answer is any JSON object (True), what this schema allows, or text (False). The rest is ChatRequest's.
    """

    sampling: Mapping[str, Any] = field(default_factory=dict)
    system: str | None = None
    max_tokens: int | None = None
    reasoning_budget: int | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    json: Mapping[str, object] | bool = False

    @classmethod
    def from_record(cls, value: Value) -> ChatSettings:
        """Read a line of settings; fields of the sampling that this version does not know are left out."""
        sampling, system, tools = value.get("sampling"), value.get("system"), value.get("tools")
        max_tokens, budget, schema = (value.get(name) for name in ("max_tokens", "reasoning_budget", "json"))
        return cls(
            {name: read_number(v, name) for name, v in sampling.members() if name in SETTING_BOUNDS}
            if sampling
            else {},
            system.text() if system else None,
            max_tokens.integer(1) if max_tokens else None,
            budget.integer() if budget else None,
            tuple(_tool(tool) for tool in tools.array()) if tools else (),
            False if schema is None else schema.flag() if isinstance(schema.raw, bool) else schema.object(),
        )


@dataclass(slots=True)
class AnswerUsage:
    """Tokens and seconds of one answer, filled in while it comes. n_steps, n_drafted: 0 where they are not known.

    finish_reason: stop, length, tool_calls, cancelled or error; "" until the end. n_ctx: None if it is not known.
    """

    n_prompt: int = 0
    n_cached: int = 0
    n_reasoning: int = 0
    n_text: int = 0
    n_steps: int = 0
    n_drafted: int = 0
    n_accepted: int = 0
    n_ctx: int | None = None
    prompt_seconds: float = 0.0
    reasoning_seconds: float = 0.0
    generation_seconds: float = 0.0
    finish_reason: str = ""
    budget_reached: bool = False
    loop_broken: bool = False

    @classmethod
    def from_record(cls, value: Value) -> AnswerUsage:
        """Read the usage of a message's line."""
        shapes: dict[type, Callable[[Value], Any]] = {
            bool: Value.flag, int: Value.integer, type(None): Value.integer, float: _seconds, str: Value.text
        }  # fmt: skip
        # the default of a field says what it must be; n_ctx has None, which stands for an unknown number
        given = ((f.name, shapes[type(f.default)], value.get(f.name)) for f in fields(cls))
        return cls(**{name: shape(member) for name, shape, member in given if member is not None})

    @property
    def n_generated(self) -> int:
        """Tokens that the model made, reasoning included."""
        return self.n_reasoning + self.n_text

    @property
    def n_context(self) -> int:
        """How many tokens of the context are in use after the answer."""
        return self.n_prompt + self.n_generated

    @property
    def context_is_full(self) -> bool:
        """Whether the answer ended where the context does; False if that is not known."""
        return self.n_ctx is not None and self.n_context >= self.n_ctx

    @property
    def tokens_per_second(self) -> float:
        """The speed of generation, 0 where it was not measured."""
        return self.n_generated / self.generation_seconds if self.generation_seconds else 0.0


@dataclass(frozen=True, slots=True)
class ConversationEntry:
    """A message of the conversation; of an answer also what it took, and whether it was cut short."""

    message: ChatMessage
    usage: AnswerUsage | None = None
    interrupted: bool = False

    def to_record(self) -> dict[str, object]:
        """Return the entry as it is saved."""
        record: dict[str, object] = {"type": "message", "message": self.message}
        if self.usage is not None:
            record["usage"] = asdict(self.usage)
        return record | ({"interrupted": True} if self.interrupted else {})

    @classmethod
    def from_record(cls, value: Value) -> ConversationEntry:
        """Read a message's line, as far as anything here relies on its shape."""
        message, usage, interrupted = value["message"], value.get("usage"), value.get("interrupted")
        if message["role"].text() not in _ROLES:
            raise message["role"].wrong(f"one of {', '.join(_ROLES)}")
        message["content"].text()
        for name in ("reasoning_content", "tool_call_id"):
            if text := message.get(name):
                text.text()
        if calls := message.get("tool_calls"):
            for call in calls.array():
                call["id"].text()
                call["function"]["name"].text()
                call["function"]["arguments"].text()
        # null is how some clients spell what is not there, and templates take it for a text
        kept = {name: member for name, member in message.object().items() if member is not None}
        counts = AnswerUsage.from_record(usage) if usage else None
        return cls(kept, counts, interrupted.flag() if interrupted else False)


def read_number(value: Value, name: str) -> float | int:
    """Return the value of the setting `name`. The value's own error says if it is not within the bounds."""
    least, most = SETTING_BOUNDS[name]
    if isinstance(least, int) and isinstance(most, int):
        return value.integer(least, most)
    return value.number(least, most)


def _seconds(value: Value) -> float:
    return value.number(0)


def _tool(value: Value) -> Mapping[str, Any]:
    (value.get("function") or value)["name"].text()
    return value.object()
