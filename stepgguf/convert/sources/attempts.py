"""Doing again what may succeed the next time: exponential backoff with jitter, and an end."""

from __future__ import annotations

import random
from collections.abc import Callable
from threading import Event
from typing import TypeVar

from stepgguf.errors import HubError

MOST_ATTEMPTS = 10  # about three minutes in all
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 60.0  # seconds
LONGEST_WISH = 600.0  # seconds that a server may ask for
AGAIN = "Check the network, then repeat the command: it goes on from there."

T = TypeVar("T")


class PassingFailure(Exception):
    """What may be gone at the next attempt. pause: seconds that the server asked for, if it did."""

    def __init__(self, problem: str, pause: float | None = None) -> None:
        super().__init__(problem)
        self.pause = pause


class Attempts:
    """The attempts to do one thing. what: the thing, as the error's sentence begins. stop: ends the pauses."""

    def __init__(self, what: str, stop: Event, most: int = MOST_ATTEMPTS) -> None:
        self._what, self._stop, self._most, self._failed = what, stop, most, 0

    def pause_after(self, failure: PassingFailure) -> None:
        """Wait for the next attempt. HubError, with the last failure, if there is none left or all shall stop."""
        self._failed += 1
        if self._failed == self._most or self._stop.wait(self._pause(failure)):
            raise HubError(f"{self._what}: {failure} ({self._failed} attempts)", hint=AGAIN) from failure

    def _pause(self, failure: PassingFailure) -> float:
        if failure.pause is not None:  # a little later than that, and not all threads at once
            return min(failure.pause, LONGEST_WISH) + random.uniform(0, FIRST_PAUSE)
        return min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** (self._failed - 1)) * random.uniform(0.5, 1.0)


def until_done(action: Callable[[], T], what: str, stop: Event, most: int) -> T:
    """The result of an action, which is repeated after each PassingFailure. HubError after the last."""
    attempts = Attempts(what, stop, most)
    while True:
        try:
            return action()
        except PassingFailure as failure:
            attempts.pause_after(failure)
