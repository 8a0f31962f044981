"""A request as an iterator of events."""

from __future__ import annotations

from typing import cast

from stepgguf.runtime.engine import Engine, Finished, Prefill, Request, Sink, Step, Stream, Timings, Tokens


class ByHand:
    """An engine, and the ticket of its one request: the test says when it does what."""

    def __init__(self) -> None:
        self.cancelled = False

    def submit(self, request: Request, sink: Sink) -> ByHand:
        self.emit = sink
        return self

    def cancel(self) -> None:
        if not self.cancelled:
            self.emit(CANCELLED)
        self.cancelled = True


PREFILL, TOKENS = Prefill(1, 1, 0), Tokens((Step(5, b"x"),))
CANCELLED = Finished("cancelled", Timings())


def opened() -> tuple[ByHand, Stream]:
    engine = ByHand()
    return engine, Stream(cast("Engine", engine), Request((1,)))


def test_it_gives_the_events_in_order_and_ends_after_the_last() -> None:
    engine, stream = opened()
    last = Finished("stop", Timings())
    for event in (PREFILL, TOKENS, last):
        engine.emit(event)
    assert list(stream) == [PREFILL, TOKENS, last]
    assert stream.finished == last
    assert list(stream) == []
    assert stream.close() == last


def test_whoever_asks_with_a_timeout_stays_awake() -> None:
    engine, stream = opened()
    assert stream.next_event(0.01) is None
    assert stream.finished is None, "nothing came, which is not the end"
    engine.emit(TOKENS)
    assert stream.next_event(5) == TOKENS
    engine.emit(CANCELLED)
    assert stream.next_event(5) == stream.finished == CANCELLED
    assert stream.next_event() is None, "there will never be another"


def test_a_cancel_leaves_the_events_up_to_the_end_and_a_close_drops_them() -> None:
    for closed in (False, True):
        engine, stream = opened()
        engine.emit(TOKENS)
        if closed:
            assert stream.close() == CANCELLED
        else:
            stream.cancel()
        assert engine.cancelled
        assert list(stream) == ([] if closed else [TOKENS, CANCELLED])
