"""What is read ahead is bounded, and given to whoever asks for just that."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from stepgguf.convert.sources.read_ahead import CONNECTIONS, MOST_BYTES, ReadAhead


@pytest.fixture
def ahead() -> Iterator[ReadAhead]:
    found = ReadAhead()
    yield found
    found.close()


def test_a_range_is_given_once(ahead: ReadAhead) -> None:
    ahead.start("a", 1, lambda: bytearray(b"x"))
    found = ahead.take("a")
    assert found in (None, bytearray(b"x"))  # None if nobody had begun to read it
    assert ahead.take("a") is None
    assert ahead.take("b") is None


def test_what_failed_fails_where_it_is_asked_for(ahead: ReadAhead) -> None:
    begun = threading.Event()

    def read() -> bytearray:
        begun.set()
        raise ValueError("gone")

    ahead.start("a", 1, read)
    begun.wait()
    with pytest.raises(ValueError, match="gone"):
        ahead.take("a")


def test_no_more_is_begun_than_may_be_held(ahead: ReadAhead) -> None:
    read: list[int] = []
    half = MOST_BYTES // 2
    for number in range(3):
        ahead.start(number, half, lambda number=number: bytearray(read.append(number) or 1))  # type: ignore[misc]
    ahead.close()
    assert read == [0, 1][: len(read)]
    assert ahead.take(2) is None


def test_what_nobody_asks_for_makes_room_in_time(ahead: ReadAhead) -> None:
    ahead.start("old", MOST_BYTES, bytearray)
    for number in range(300):
        ahead.start(number, MOST_BYTES, bytearray)
    assert ahead._waiting.keys() == {255}  # the first to come when "old" was stale
    assert ahead.take("old") is None


def test_what_waits_for_a_connection_is_left_to_whoever_asks_for_it(ahead: ReadAhead) -> None:
    go_on = threading.Event()
    for number in range(CONNECTIONS):
        ahead.start(number, 1, lambda: bytearray(go_on.wait()))
    ahead.start("last", 1, bytearray)
    assert ahead.take("last") is None
    go_on.set()
