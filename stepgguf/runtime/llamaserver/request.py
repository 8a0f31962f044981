"""RemoteRequest: one request as one or more completions.

llama-server knows no forced tokens and no grammar that waits for a token id. So a request runs in legs, each a
completion of everything so far, whose prompt llama-server has in its cache:

    prompt ──leg──> reasoning ──budget, loop or end_reasoning──> closing tokens ──leg──> answer
    prompt ──leg──> ... start token ──leg, with the grammar──> ...

A leg ends by itself where that can be told beforehand: n_predict is the budget, the start tokens' texts are stop
strings. Otherwise its connection is closed.

The stream has one event a token, but none for a token that leaves a character unfinished (its text comes with the
token that completes it), and the text of a control token is empty. So tokens are held until text comes.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from stepgguf.errors import BadGrammar, EngineError, RequestError, StepggufError
from stepgguf.runtime.engine import Finished, FinishReason, Logprob, Prefill, Request, Sink, Step, Timings, Tokens
from stepgguf.runtime.http_events import ConnectionLost, HttpExchange
from stepgguf.runtime.llamaserver.client import Json, LlamaServerClient
from stepgguf.runtime.llamaserver.gbnf import with_start_rule
from stepgguf.runtime.llamaserver.process import LlamaServer
from stepgguf.runtime.llamaserver.settings import shared_settings
from stepgguf.runtime.llamaserver.vocabulary import ServerVocabulary
from stepgguf.runtime.reasoning_limit import ReasoningLimit

_TOKENS_OF_A_CHARACTER = 4  # at most: it has so many bytes
_RELEASE_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class ServerHandle:
    """What all requests to one llama-server share.

    speculates: it drafts tokens, which come without log probabilities. open_legs: one entry for each completion that
    runs, to compare with how many slots are busy.
    """

    server: LlamaServer
    client: LlamaServerClient
    vocabulary: ServerVocabulary
    n_ctx: int
    n_parallel: int
    speculates: bool
    open_legs: list[HttpExchange] = field(default_factory=list)


class RemoteRequest:
    """A request on its way. One thread serves it; `cancel`, `end_reasoning` and `interrupt` come from any."""

    def __init__(self, handle: ServerHandle, request: Request, sink: Sink) -> None:
        self.emit = sink
        self.cancelled = False
        self.timings = Timings(n_prompt=len(request.prompt))
        self._handle, self._request = handle, request
        self._tokens = list(request.prompt)
        room = handle.n_ctx - len(request.prompt)
        self._max_tokens = room if request.max_tokens is None else min(room, request.max_tokens)
        self._reasoning = ReasoningLimit(request.reasoning) if request.reasoning is not None else None
        self._reasoning_must_end = False  # `end_reasoning` was called and is not carried out yet
        self._forced: list[int] = []
        self._banned = request.banned if request.reasoning is None else frozenset[int]()
        self._starts = dict(request.grammar.starts) if request.grammar is not None else {}
        self._rule = "root" if request.grammar is not None and not self._starts else None
        self._lock = threading.RLock()
        self._exchange: HttpExchange | None = None  # the completion that runs
        self._settings: Json = {}
        self._nothing_came = False  # in the last leg, because a character was cut
        self._unreported: list[Step] = []  # forced before the prompt was read
        self._submitted = time.monotonic()
        self._admitted = self._prompt_read = 0.0

    # from any thread --------------------------------------------------------------------------------------------

    def cancel(self) -> None:
        """See `Ticket.cancel`."""
        self.cancelled = True
        self.interrupt()

    def end_reasoning(self) -> None:
        """See `Ticket.end_reasoning`. The leg that runs is broken off, and `_go_on` forces the closing tokens."""
        with self._lock:
            if self._reasoning is None or not self._reasoning.is_open:
                return
            self._reasoning_must_end = True
            self.interrupt()

    def interrupt(self) -> None:
        """Break off the completion that runs."""
        with self._lock:
            if self._exchange is not None:
                self._exchange.interrupt()

    # from its thread --------------------------------------------------------------------------------------------

    def serve(self) -> FinishReason:
        """Go leg after leg, to the end. Returns why it ended; StepggufError if it failed."""
        self._admitted = time.monotonic()
        self.timings.queue_seconds = self._admitted - self._submitted
        if self._reasoning is not None:
            self._forced.extend(self._reasoning.check_budget(self.timings))
        reason: FinishReason | None = None
        while reason is None:
            # In short waits, so that a request whose server loads again can be cancelled.
            while not self.cancelled and not self._handle.server.wait_until_ready(0.2):
                pass
            try:
                reason = "cancelled" if self.cancelled else self._go_on()
            except ConnectionLost:  # unless we broke it off ourselves, the server is gone or going
                if not self.cancelled and not self._reasoning_must_end:
                    raise self._handle.server.lost_connection_error() from None
        return reason

    def finished_event(self, reason: FinishReason, error: StepggufError | None) -> Finished:
        """Return its last event, for the caller to emit; everything else has been emitted then."""
        if self._unreported:
            self.emit(Tokens(tuple(self._unreported)))
        timings, now = self.timings, time.monotonic()
        timings.n_generated = len(self._tokens) - len(self._request.prompt)
        if self._prompt_read:
            timings.generation_seconds = now - self._prompt_read
        elif self._admitted:
            timings.prompt_seconds = now - self._admitted
        return Finished(reason, timings, error)

    @property
    def _n_left(self) -> int:
        return len(self._request.prompt) + self._max_tokens - len(self._tokens)

    def _go_on(self) -> FinishReason | None:
        """Put what is forced, then go a leg. Returns why the request has ended; None: it has not."""
        if self._reasoning_must_end and self._reasoning is not None:
            self._reasoning_must_end = False
            self._forced.extend(self._reasoning.close())
        if self._forced:
            forced, self._forced = self._forced[: self._n_left], []
            self._banned = self._request.banned
            self._take_steps([Step(token, self._handle.vocabulary.piece(token), forced=True) for token in forced])
        return self._run_leg() if self._n_left else "length"

    def _run_leg(self) -> FinishReason | None:
        """Run one completion. Returns why the request has ended; None: it has not."""
        with self._handle.client.open_completion() as exchange:
            with self._lock:
                if self.cancelled or self._reasoning_must_end:  # said while there was nothing to interrupt
                    return None
                self._exchange = exchange
            self._handle.open_legs.append(exchange)
            try:
                return self._read_leg(exchange)
            except RequestError as error:
                if self._rule is None:
                    raise
                raise BadGrammar(error.message, param="grammar") from error
            finally:
                self._handle.open_legs.remove(exchange)
                with self._lock:
                    self._exchange = None

    def _read_leg(self, exchange: HttpExchange) -> FinishReason | None:
        """Take the tokens of a leg, up to its end or to where it must end."""
        limit = self._leg_limit()
        self._nothing_came = True
        held: list[Json] = []  # events of tokens whose text has not come
        n_seen, counts = 0, None
        try:
            for event in self._handle.client.events(exchange, self._leg_body(limit)):
                counts = event.get("timings", counts)
                if event["stop"]:
                    return self._end_leg(event, held, limit)
                if "prompt_progress" in event:
                    self._report_progress(event["prompt_progress"])
                    continue
                held.append(event)
                if not event["content"]:  # inside a character, or a control token
                    continue
                steps = self._steps_of(held, whole=event["tokens_predicted"] - n_seen == len(held))
                held, n_seen = [], event["tokens_predicted"]
                if not self._take_steps(steps) and n_seen < limit:
                    break  # at the limit its last event is due, with the counts
            exchange.interrupt()
            self._await_release()
            return None
        finally:
            self._add_counts(counts or {})

    def _end_leg(self, event: Json, held: list[Json], limit: int) -> FinishReason | None:
        """Take the last event of a leg. The end token is the last of the tokens before it."""
        at_end = event["stop_type"] == "eos"
        if not self._take_steps(self._steps_of(held[:-1] if at_end else held, whole=True)):
            return None
        if at_end:
            return "stop"
        if event["stop_type"] == "limit" and (event["truncated"] or event["tokens_predicted"] < limit):
            return "length"
        return "length" if self._nothing_came and limit >= self._n_left else None

    def _take_steps(self, steps: Sequence[Step]) -> bool:
        """Add tokens and report them. False: the leg must end here; what it made after that does not count."""
        steps = steps[: self._n_left]  # more, if a character was spelled anew in more tokens
        going_on = True
        for n, step in enumerate(steps, 1):
            self._tokens.append(step.token_id)
            if self._reasoning is not None:
                self._forced.extend(self._reasoning.feed(step.token_id, self.timings))
            if self._rule is None and step.token_id in self._starts:
                self._rule = self._starts[step.token_id]
                going_on = step.forced  # forced ones come between legs: the next has the grammar anyway
            if self._forced or not going_on:
                steps, going_on = steps[:n], False
                break
        if steps and not steps[-1].forced and not self._prompt_read:
            self._prompt_read = time.monotonic()
            self.timings.prompt_seconds = self._prompt_read - self._admitted
        self._nothing_came &= not steps
        self._unreported += steps
        if self._unreported and self._prompt_read:
            self.emit(Tokens(tuple(self._unreported)))
            self._unreported = []
        return going_on

    def _steps_of(self, events: list[Json], *, whole: bool) -> list[Step]:
        """Return the tokens of events, whose text is there now. Not `whole`: there were more, which made no event."""
        text = "".join(event["content"] for event in events)
        if not whole:
            return [Step(token, piece) for token, piece in self._handle.vocabulary.spell(text)]
        return [self._step_of(event, text if len(events) == 1 else "") for event in events]

    def _step_of(self, event: Json, text: str) -> Step:
        (token,) = event["tokens"]
        piece = text.encode() or self._handle.vocabulary.piece(token)
        if self._request.top_logprobs is None or "completion_probabilities" not in event:
            return Step(token, piece)
        (entry,) = event["completion_probabilities"]
        top = tuple(
            Logprob(one["id"], bytes(one["bytes"]) or self._handle.vocabulary.piece(one["id"]), one["logprob"])
            for one in entry["top_logprobs"][: self._request.top_logprobs]
        )
        return Step(token, piece, False, entry["logprob"], top)

    # a leg's request --------------------------------------------------------------------------------------------

    def _leg_limit(self) -> int:
        """Return n_predict. It is a single token where drafted ones would come without their log probabilities."""
        limit = self._n_left
        if self._reasoning is not None and self._reasoning.n_left is not None:
            limit = min(limit, self._reasoning.n_left)
        if self._request.top_logprobs is not None and self._handle.speculates and self._rule is None:
            limit = 1
        return max(limit, _TOKENS_OF_A_CHARACTER) if self._nothing_came else limit

    def _leg_body(self, limit: int) -> Json:
        request = self._request
        self._settings = self._settings or shared_settings(request, self._handle.vocabulary, self._handle.n_ctx)
        body = {**self._settings, "prompt": self._tokens, "n_predict": limit}
        body["logit_bias"] = [*self._settings["logit_bias"], *((token, False) for token in sorted(self._banned))]
        if request.sampling.seed is not None:  # no leg may draw again what the one before drew
            body["seed"] = (request.sampling.seed + len(self._tokens) - len(request.prompt)) & 0x7FFFFFFF
        if request.grammar is not None and self._rule is not None:
            body["grammar"] = with_start_rule(request.grammar.gbnf, self._rule)
        elif self._starts:
            # The leg ends there, and the next one has the grammar.
            body["stop"] = [self._handle.vocabulary.piece(token).decode() for token in self._starts]
        return body

    # around it --------------------------------------------------------------------------------------------------

    def _report_progress(self, progress: Json) -> None:
        if not self._prompt_read:
            self.timings.n_cached = progress["cache"]
            self.emit(Prefill(progress["processed"], progress["total"], progress["cache"]))

    def _add_counts(self, counts: Json) -> None:
        """Add up a leg's numbers. llama-server does not tell the drafts of one head from another's."""
        timings, drafted, accepted = self.timings, counts.get("draft_n", 0), counts.get("draft_n_accepted", 0)
        timings.n_steps += counts.get("predicted_n", 0) - accepted
        if drafted:
            timings.drafted = [sum(timings.drafted) + drafted]
            timings.accepted = [sum(timings.accepted) + accepted]

    def _await_release(self) -> None:
        """Wait until the slot of a broken leg is free.

        It notices a closed connection with its next token. Until then the next leg would get another slot, without the
        cache.
        """
        deadline = time.monotonic() + _RELEASE_SECONDS
        with contextlib.suppress(EngineError):  # a server without /slots
            while self._handle.n_parallel > 1 and time.monotonic() < deadline:
                n_busy = sum(slot["is_processing"] for slot in self._handle.client.get("/slots"))
                if n_busy < len(self._handle.open_legs):
                    return
                time.sleep(0.01)
