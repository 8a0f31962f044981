"""Many requests at once: none waits for ever, none changes or ends another."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import llama_cpp
import pytest

from stepgguf.errors import BadGrammar, ContextLengthExceeded, EngineBusy, EngineDied
from stepgguf.runtime.engine import Event, Finished, Grammar, Prefill, Queued, Request, Sampling, Stream, Tokens
from stepgguf.runtime.llama import LlamaEngine
from stepgguf.runtime.llama.cache import SequenceCache
from stepgguf.runtime.llama.scheduler import Scheduler
from tests.runtime.llama.conftest import GREEDY, eventually, question, run, tokens_of

QUESTIONS = [question(f"What is {n} + {3 * n}?") for n in range(101, 113)]


class Collected:
    """A sink that keeps what it is given."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.times: list[float] = []
        self.done = threading.Event()

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        self.times.append(time.monotonic())
        if isinstance(event, Finished):
            self.done.set()

    @property
    def tokens(self) -> list[int]:
        return tokens_of(self.events)

    @property
    def finished(self) -> Finished:
        assert self.done.wait(60)
        event = self.events[-1]
        assert isinstance(event, Finished)
        return event


def submit(engine: LlamaEngine, prompt: list[int], **more: object) -> Collected:
    sink = Collected()
    engine.submit(Request(tuple(prompt), **{"sampling": GREEDY, **more}), sink)  # type: ignore[arg-type]
    return sink


@pytest.mark.slow
def test_twelve_requests_in_four_slots_answer_as_each_alone(demo_gguf: Path, start: Callable[..., LlamaEngine]) -> None:
    alone = start(demo_gguf, n_ctx=1024, draft=0)
    together = start(demo_gguf, n_ctx=1024, n_parallel=4)
    prompts = [alone.tokenize(text) for text in QUESTIONS]
    expected = [run(alone, prompt)[0] for prompt in prompts]
    sinks = [submit(together, prompt) for prompt in prompts]
    assert [s.finished.reason for s in sinks] == ["stop"] * 12
    assert [s.tokens for s in sinks] == expected
    assert sum(isinstance(e, Queued) for s in sinks for e in s.events) == 8


@pytest.mark.slow
def test_decoding_goes_on_while_a_long_prompt_is_read(random_model: Path, start: Callable[..., LlamaEngine]) -> None:
    engine = start(random_model, n_ctx=8192, n_parallel=2)
    talker = submit(engine, [5] * 10, max_tokens=4000, ignore_end=True)
    while not talker.tokens:
        time.sleep(0.01)
    reader = submit(engine, [7 + i % 500 for i in range(4000)], max_tokens=1)
    assert reader.finished.reason == "length"
    began = next(t for t, e in zip(reader.times, reader.events, strict=True) if isinstance(e, Prefill))
    ended = reader.times[-1]
    chunks = sum(isinstance(e, Prefill) for e in reader.events)
    during = sum(began < t < ended for t, e in zip(talker.times, talker.events, strict=True) if isinstance(e, Tokens))
    assert chunks >= 8, "4,000 tokens in chunks of at most 512"
    assert during >= chunks - 2, "a token with every chunk"


@pytest.mark.slow
def test_requests_that_outgrow_the_context_together_all_come_to_their_end(
    demo_gguf: Path, start: Callable[..., LlamaEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four times 31 + 54 tokens in a context of 256: some are set back, and go on as if nothing had been."""
    alone, engine = start(demo_gguf, n_ctx=512), start(demo_gguf, n_ctx=256, n_parallel=4)
    set_back, original = [], Scheduler.set_back
    monkeypatch.setattr(Scheduler, "set_back", lambda self, r: set_back.append(r) or original(self, r))
    prompts = [alone.tokenize(text) for text in QUESTIONS[:4]]
    expected = [run(alone, prompt)[0] for prompt in prompts]
    sinks = [submit(engine, prompt) for prompt in prompts]
    assert [s.finished.reason for s in sinks] == ["stop"] * 4
    assert [s.tokens for s in sinks] == expected
    assert set_back, "all of them fitted: the test says nothing"


@pytest.mark.slow
def test_one_request_that_fills_the_context_ends_with_length(
    random_model: Path, start: Callable[..., LlamaEngine]
) -> None:
    engine = start(random_model, n_ctx=256)
    tokens, finished = run(engine, [5] * 100, ignore_end=True)
    assert finished.reason == "length"
    assert len(tokens) == 156
    with pytest.raises(ContextLengthExceeded, match="the prompt has 256 tokens, the context 256"):
        run(engine, [5] * 256)


@pytest.mark.slow
def test_a_cancelled_request_ends_within_a_decode_and_leaves_its_prefix(
    random_model: Path, start: Callable[..., LlamaEngine]
) -> None:
    engine = start(random_model, n_ctx=8192)
    sink = Collected()
    ticket = engine.submit(Request(tuple(7 + i % 500 for i in range(6000)), GREEDY), sink)
    while len(sink.events) < 3:
        time.sleep(0.001)
    before = len(sink.events)
    ticket.cancel()
    assert sink.finished.reason == "cancelled"
    assert len(sink.events) <= before + 2, "more than the chunk in progress was read"
    _, again = run(engine, [7 + i % 500 for i in range(1024)], max_tokens=1)
    assert again.timings.n_cached >= 512
    ticket.cancel()  # after the end it does nothing


def test_a_waiting_request_can_be_cancelled(random_model: Path, start: Callable[..., LlamaEngine]) -> None:
    engine = start(random_model, n_ctx=4096)
    first = submit(engine, [5] * 10, max_tokens=3000, ignore_end=True)
    sink = Collected()
    engine.submit(Request((5, 6), GREEDY), sink).cancel()
    assert sink.finished.reason == "cancelled"
    assert not first.done.is_set()


def test_a_full_queue_refuses_and_says_when_to_come_back(random_model: Path, start: Callable[..., LlamaEngine]) -> None:
    engine = start(random_model, n_ctx=4096, queue_limit=2)
    running = [submit(engine, [5] * 10, max_tokens=3000, ignore_end=True) for _ in range(3)]
    with pytest.raises(EngineBusy, match="1 requests are running and 2 are waiting") as caught:
        submit(engine, [5] * 10)
    assert caught.value.retry_after >= 1
    assert not running[0].done.is_set()


def test_a_failed_decode_is_told_to_those_it_hits_and_the_engine_recovers(
    demo_gguf: Path, start: Callable[..., LlamaEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start(demo_gguf, n_ctx=1024, draft=0)
    prompt = engine.tokenize(QUESTIONS[0])
    expected, _ = run(engine, prompt)
    decode, failures = llama_cpp.llama_decode, [0] * 5 + [-3]
    monkeypatch.setattr(llama_cpp, "llama_decode", lambda *a: (failures.pop(0) if failures else 0) or decode(*a))
    hit, waiting = submit(engine, prompt), submit(engine, prompt)
    assert hit.finished.reason == "error"
    assert isinstance(hit.finished.error, EngineDied)
    assert hit.finished.error.recovered
    assert "llama_decode failed with code -3" in hit.finished.error.message
    assert waiting.finished.reason == "stop"
    assert waiting.tokens == expected
    assert engine.stats().n_recoveries == 1


def test_an_engine_that_fails_again_and_again_gives_up_and_says_so(
    demo_gguf: Path, start: Callable[..., LlamaEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start(demo_gguf, n_ctx=1024)
    monkeypatch.setattr(llama_cpp, "llama_decode", lambda *a: -2)
    sinks = [submit(engine, [5] * 10) for _ in range(6)]
    assert all(isinstance(s.finished.error, EngineDied) for s in sinks)
    assert not sinks[-1].finished.error.recovered  # type: ignore[union-attr]
    assert eventually(lambda: not engine.stats().alive)
    with pytest.raises(EngineDied, match="has stopped"):
        submit(engine, [5] * 10)


def test_an_engine_that_cannot_be_set_up_again_stops_and_can_be_closed(
    demo_gguf: Path, start: Callable[..., LlamaEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start(demo_gguf, n_ctx=1024)
    run(engine, engine.tokenize(QUESTIONS[0]))  # something is in the context that is lost
    monkeypatch.setattr(llama_cpp, "llama_decode", lambda *a: -2)
    monkeypatch.setattr(llama_cpp, "llama_init_from_model", lambda *a: None)
    freed, free = [], llama_cpp.llama_model_free
    monkeypatch.setattr(llama_cpp, "llama_model_free", lambda handle: freed.append(handle) or free(handle))
    sinks = [submit(engine, [5] * 10) for _ in range(2)]
    assert all(isinstance(s.finished.error, EngineDied) for s in sinks)
    assert eventually(lambda: not engine.stats().alive)
    assert not freed
    engine.close()
    assert len(freed) == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_bug_in_the_engine_leaves_nobody_waiting(
    demo_gguf: Path, start: Callable[..., LlamaEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start(demo_gguf, n_ctx=1024)
    monkeypatch.setattr(SequenceCache, "place", lambda *a: 1 / 0)
    assert isinstance(submit(engine, [5] * 10).finished.error, EngineDied)
    engine.close()
    assert not engine.stats().alive


def test_a_grammar_that_cannot_be_used_is_refused_or_ends_its_request_alone(
    demo_gguf: Path, start: Callable[..., LlamaEngine]
) -> None:
    engine = start(demo_gguf, n_ctx=1024, n_parallel=2)
    prompt = engine.tokenize(QUESTIONS[0])
    with pytest.raises(BadGrammar, match="does not compile"):
        submit(engine, prompt, grammar=Grammar("root ::= nonsense"))
    fine = submit(engine, prompt)
    dead_end = submit(engine, prompt, grammar=Grammar('root ::= "a" <[999999]>'))
    assert isinstance(dead_end.finished.error, BadGrammar)
    assert fine.finished.reason == "stop"


def test_requests_with_one_beginning_read_it_once(demo_gguf: Path, start: Callable[..., LlamaEngine]) -> None:
    """Four answers to one long prompt at once (n=4): three wait for the first to read it, then share."""
    engine = start(demo_gguf, n_ctx=4096, n_parallel=4)
    prompt = engine.tokenize("<|im_start|>system\n" + "Be brief. " * 150 + "<|im_end|>\n" + QUESTIONS[0])
    turns = (max(i for i, token in enumerate(prompt) if token == engine.token_id("<|im_start|>")),)
    sinks = [submit(engine, prompt, turns=turns) for _ in range(4)]
    cached = [s.finished.timings.n_cached for s in sinks]
    assert cached == [0, turns[0], turns[0], turns[0]]
    assert len({tuple(s.tokens) for s in sinks}) == 1


@pytest.mark.slow
def test_a_request_with_another_beginning_does_not_wait_for_that(
    random_model: Path, start: Callable[..., LlamaEngine]
) -> None:
    engine = start(random_model, n_ctx=16384, n_parallel=3, draft=0)
    long = [7 + i % 500 for i in range(6000)]
    first, same = submit(engine, long, max_tokens=1), submit(engine, long, max_tokens=1)
    other = submit(engine, [5] * 10, max_tokens=1)
    assert other.finished.reason == "length"
    assert not first.done.is_set(), "it has waited until the long prompt was read"
    assert same.finished.timings.n_cached >= 5990


def test_closing_ends_what_runs(random_model: Path, start: Callable[..., LlamaEngine]) -> None:
    engine = start(random_model, n_ctx=4096)
    sinks = [submit(engine, [5] * 10, max_tokens=3000, ignore_end=True) for _ in range(2)]
    while not sinks[0].tokens:
        time.sleep(0.01)
    engine.close()
    assert [s.finished.reason for s in sinks] == ["error", "error"]
    with pytest.raises(EngineDied):
        submit(engine, [5])


def test_a_stream_that_is_closed_cancels(random_model: Path, start: Callable[..., LlamaEngine]) -> None:
    engine = start(random_model, n_ctx=4096)
    stream = Stream(engine, Request((5,) * 10, Sampling(), ignore_end=True))
    next(iter(stream))
    assert stream.close().reason == "cancelled"
    assert engine.stats().n_running == 0
