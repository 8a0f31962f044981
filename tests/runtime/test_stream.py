"""A request as an iterator of events."""

from __future__ import annotations

import threading

from stepgguf.runtime.engine import Finished, Prefill, Request, Stream, Tokens
from tests.scripted_engine import ScriptedEngine

REQUEST = Request((1,))


def test_it_gives_the_events_in_order_and_ends_after_the_last() -> None:
    stream = Stream(ScriptedEngine(Prefill(1, 1, 0), "a", "b"), REQUEST)
    events = list(stream)
    assert [type(event) for event in events] == [Prefill, Tokens, Tokens, Finished]
    assert stream.finished == events[-1]
    assert list(stream) == []
    assert stream.close() == events[-1]


def test_whoever_asks_with_a_timeout_stays_awake() -> None:
    goes_on = threading.Event()
    stream = Stream(ScriptedEngine(goes_on, "a"), REQUEST)
    assert stream.next_event(0.01) is None
    assert stream.finished is None, "nothing came, which is not the end"
    goes_on.set()
    assert isinstance(stream.next_event(5), Tokens)
    assert stream.next_event(5) == stream.finished is not None
    assert stream.next_event() is None, "there will never be another"


def test_a_cancel_leaves_the_events_up_to_the_end() -> None:
    stream = Stream(ScriptedEngine("a", threading.Event()), REQUEST)
    stream.cancel()
    *_, last = stream
    assert isinstance(last, Finished)
    assert last.reason == "cancelled"


def test_a_close_cancels_and_drops_what_nobody_has_taken() -> None:
    stream = Stream(ScriptedEngine("a", threading.Event()), REQUEST)
    assert stream.close().reason == "cancelled"
    assert list(stream) == []
