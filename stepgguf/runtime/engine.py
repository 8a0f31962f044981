"""What runs a model: the protocol that the chat layer uses, without any engine behind it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 switch a filter off."""

    temperature: float = 1.0
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.0
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """One generated token. `forced`: put in by the caller and not sampled."""

    token_id: int
    piece: bytes
    forced: bool


class Generation(Protocol):
    """A running generation: iterate over it, stop iterating to cancel. It ends with the token before the end token.

    finish_reason is "stop" after an end token, "length" when max_tokens or the context is used up, None while it runs.
    """

    @property
    def finish_reason(self) -> str | None: ...

    def __iter__(self) -> Iterator[Step]: ...

    def force(self, token_ids: Sequence[int]) -> None:
        """Make these the next tokens, before any more is sampled."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What the chat layer needs from the model file."""

    name: str
    chat_template: str | None
    sampling: Sampling
    n_ctx: int
    n_ctx_train: int


class Engine(Protocol):
    @property
    def info(self) -> ModelInfo: ...

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a prompt; special tokens written in the text become their ids, bos is put in front."""

    def tokenize_piece(self, text: str) -> list[int]:
        """The same without bos: text that goes on from other tokens."""

    def token_id(self, text: str) -> int | None:
        """The id of a special token, None if this text is not one token."""

    def generate(self, prompt: Sequence[int], sampling: Sampling, max_tokens: int | None = None) -> Generation:
        """Start a generation after a prompt. ContextLengthExceeded if the prompt leaves no room."""

    @property
    def n_cached(self) -> int:
        """How many tokens of the last prompt did not have to be read again."""

    def close(self) -> None: ...
