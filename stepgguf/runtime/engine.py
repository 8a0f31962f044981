"""What runs a model: tokens in, tokens out. The protocol that everything above uses, without any engine behind it.

    submit(Request, sink) -> Ticket         sink(Queued)? sink(Prefill)* sink(Tokens)* sink(Finished)

An engine calls `sink` from its own thread, in order, and ends every request that it took with exactly one Finished,
also after a cancel and after its own death. A sink must be quick and must not raise.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal, Protocol

from stepgguf.errors import EngineBusy, StepggufError
from stepgguf.files.byte_sizes import GIB

FinishReason = Literal["stop", "length", "cancelled", "error"]

DEFAULT_CTX = 32768  # tokens of context at most, unless more are asked for: they take memory
DEFAULT_CACHE_RAM = 2 * GIB  # for conversations that are not in the context


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 switch a filter off.

    The frequency and presence penalties (0 is off) count generated tokens, as OpenAI defines them; the repetition
    penalty (1 is off) counts the prompt's too, as its paper and every server do. logit_bias: (token id, bias) pairs,
    added to the logits. The same seed gives the same tokens.
    """

    temperature: float = 1.0
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Grammar:
    """GBNF text (llama.cpp's). It holds from the first token on, starting with the rule `root`.

    With `starts`, pairs (token id, rule), generation is free until one of these tokens comes; the grammar holds from
    the token after it, starting with that rule. It must have been completed before an end token is allowed.
    """

    gbnf: str
    starts: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Reasoning:
    """What is known of a request's reasoning, and when it is to be closed.

    The prompt ends inside it, or the answer may start with the token `opening`. Any of `ends` closes it. After `budget`
    tokens of it (None: no limit) `closing` is forced: an optional message and an end. With `break_loops` the same
    happens when it repeats itself.
    """

    ends: frozenset[int]
    closing: tuple[int, ...]
    budget: int | None = None
    break_loops: bool = True
    opening: int | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """What to generate. `turns`: positions in the prompt where a user message starts, which later prompts may share.

    max_tokens None: as many as the context holds. top_logprobs None: no log probabilities; 0: the chosen token's;
    k: also the k most likely. ignore_end: go on after an end token (to measure speed).

    banned: token ids that are not sampled once somebody else than the model has closed its reasoning: after `closing`,
    or from the start if there is no `reasoning`.
    """

    prompt: tuple[int, ...]
    sampling: Sampling = Sampling()
    max_tokens: int | None = None
    grammar: Grammar | None = None
    reasoning: Reasoning | None = None
    turns: tuple[int, ...] = ()
    top_logprobs: int | None = None
    ignore_end: bool = False
    banned: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Logprob:
    """A token that could have come, with the natural log of its probability."""

    token_id: int
    piece: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class Step:
    """One generated token. `forced`: put in by the engine and not sampled. End tokens are not reported.

    logprob: natural log of the model's own probability, before penalties, grammar and temperature; with `top` if the
    request asked for it.
    """

    token_id: int
    piece: bytes
    forced: bool = False
    logprob: float | None = None
    top: tuple[Logprob, ...] = ()


@dataclass(slots=True)
class Timings:
    """Counts and seconds of one request. Its engine fills it in while it runs.

    drafted, accepted: guesses of each MTP block, the first block first. n_steps: decodes of the model that made tokens.
    n_reasoning: tokens of reasoning among the generated, without those that close it.
    budget_reached, loop_broken: why the reasoning was closed, if the model did not close it itself.
    """

    n_prompt: int = 0
    n_cached: int = 0
    n_generated: int = 0
    n_reasoning: int = 0
    n_steps: int = 0
    queue_seconds: float = 0.0
    prompt_seconds: float = 0.0
    generation_seconds: float = 0.0
    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    budget_reached: bool = False
    loop_broken: bool = False


@dataclass(frozen=True, slots=True)
class Queued:
    """The request waits; so many others are served first."""

    n_ahead: int


@dataclass(frozen=True, slots=True)
class Prefill:
    """The prompt is being read: n_done of n_prompt tokens, n_cached of them without work."""

    n_done: int
    n_prompt: int
    n_cached: int


@dataclass(frozen=True, slots=True)
class Tokens:
    """What one decode brought the request: one token, more with MTP."""

    steps: tuple[Step, ...]


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of a request, and why it ended.

    "stop": an end token; "length": max_tokens or the context is used up; "cancelled": by its ticket; "error": see
    `error`.
    """

    reason: FinishReason
    timings: Timings
    error: StepggufError | None = None


Event = Queued | Prefill | Tokens | Finished
Sink = Callable[[Event], None]


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What the layers above need from the model file. n_ctx: the longest prompt and answer of one request, tokens.

    engine names what runs it, e.g. "llama.cpp 0.3.36".
    """

    name: str
    chat_template: str | None
    sampling: Sampling
    n_ctx: int
    n_ctx_train: int
    n_vocab: int
    engine: str


@dataclass(slots=True)
class Stats:
    """Totals since the engine was started, and how it is now. Bytes are of host memory.

    drafted, accepted: as in Timings. n_context_used: tokens that are in the context. cache_bytes: what is kept of
    conversations beside it. n_recoveries: how often the engine lost its context or process and went on.
    """

    n_requests: int = 0
    n_failed: int = 0
    n_running: int = 0
    n_queued: int = 0
    n_prompt_tokens: int = 0
    n_cached_tokens: int = 0
    n_generated_tokens: int = 0
    n_steps: int = 0
    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    prompt_seconds: float = 0.0
    generation_seconds: float = 0.0
    n_context_used: int = 0
    cache_bytes: int = 0
    n_recoveries: int = 0
    alive: bool = True

    def busy_error(self, n_parallel: int, queue_limit: int) -> EngineBusy:
        """Return the error that a request gets when the queue is full. `retry_after`: the mean time of a request so
        far."""
        seconds = self.generation_seconds / max(1, self.n_requests)
        return EngineBusy(
            f"{n_parallel} requests are running and {queue_limit} are waiting",
            retry_after=max(1, min(60, round(seconds))),
        )

    def add(self, timings: Timings, *, failed: bool) -> None:
        """Count a request that has ended."""
        self.n_failed += failed
        self.n_prompt_tokens += timings.n_prompt
        self.n_cached_tokens += timings.n_cached
        self.n_generated_tokens += timings.n_generated
        self.prompt_seconds += timings.prompt_seconds
        self.generation_seconds += timings.generation_seconds
        for total, counts in ((self.drafted, timings.drafted), (self.accepted, timings.accepted)):
            total.extend([0] * (len(counts) - len(total)))
            for i, count in enumerate(counts):
                total[i] += count


class Ticket(Protocol):
    """A request that was taken. Both methods return at once, from any thread, and do nothing after the end."""

    def cancel(self) -> None:
        """End it within one decode; what it has read stays in the cache."""

    def end_reasoning(self) -> None:
        """Close the reasoning now, as if its budget were used up."""


class Engine(Protocol):
    """What runs a model. Thread-safe."""

    @property
    def info(self) -> ModelInfo: ...

    def tokenize(self, text: str) -> list[int]:
        """Return the token ids of a prompt: special tokens written in the text become their ids, bos is put in
        front."""

    def tokenize_piece(self, text: str) -> list[int]:
        """Return the ids of a text that goes on from other tokens: as `tokenize`, without bos."""

    def tokenize_plain(self, text: str) -> list[int]:
        """Return the ids of a text in which special tokens that are written out stay text, without bos."""

    def token_id(self, text: str) -> int | None:
        """Return the id of a token by its text, None if this text is not one token."""

    def piece(self, token_id: int) -> bytes:
        """Return the bytes that a token stands for; special tokens are written out."""

    def submit(self, request: Request, sink: Sink) -> Ticket:
        """Take a request. Raises, and never calls the sink: ContextLengthExceeded, BadGrammar, EngineBusy if the queue
        is full, EngineDied."""

    def stats(self) -> Stats:
        """Return the totals up to now, as a copy."""

    def close(self) -> None:
        """End everything that runs and free the model."""


class Stream:
    """A request as an iterator of events, for callers that may block. It ends after Finished.

    Whoever must stay awake while nothing comes asks with `next_event` instead, and may change between the two.
    """

    def __init__(self, engine: Engine, request: Request) -> None:
        """Submit the request. It raises what `Engine.submit` raises."""
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._ticket = engine.submit(request, self._events.put)
        self.finished: Finished | None = None

    def __iter__(self) -> Iterator[Event]:
        while (event := self.next_event()) is not None:
            yield event

    def next_event(self, seconds: float | None = None) -> Event | None:
        """Wait for the next event, at most so many seconds. None: none came, or `finished` has been given already."""
        if self.finished is not None:
            return None
        try:
            event = self._events.get(timeout=seconds)
        except queue.Empty:
            return None
        if isinstance(event, Finished):
            self.finished = event
        return event

    def end_reasoning(self) -> None:
        """See `Ticket.end_reasoning`."""
        self._ticket.end_reasoning()

    def cancel(self) -> None:
        """See `Ticket.cancel`. The events up to Finished still come."""
        self._ticket.cancel()

    def close(self) -> Finished:
        """Cancel the request if it still runs, and wait for its end. Events that nobody has taken are dropped."""
        self.cancel()
        while self.finished is None:
            self.next_event()
        return self.finished
