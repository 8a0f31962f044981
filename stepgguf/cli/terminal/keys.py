"""The keyboard and Ctrl+C while an answer comes. Nothing blocks: whoever draws the answer looks here in between.

Ctrl+C does not raise but is counted, so no answer is torn apart in the middle of a line. The terminal's state is put
back at the end whatever happens; SIGTERM becomes SystemExit for that, see `ending_on_signals`.
"""

from __future__ import annotations

import os
import re
import select
import signal
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SignalHandler = Callable[[int, FrameType | None], object] | int | None
AGAIN_SECONDS = 1.0  # two Ctrl+C within this leave
ENTER, TOGGLE = "\n", "\x14"  # Ctrl+T
_ESCAPE = re.compile(r"\x1b(?:\[[0-9;?]*[ -/]*[@-~]|O.|.)?")  # arrows and the like: nothing to move in here


class AnswerKeys:
    """The keyboard while an answer comes; use it as a context manager.

    typed: text that was typed meanwhile, which belongs to the next question. interrupts: how often Ctrl+C was pressed.
    leave: twice within AGAIN_SECONDS.
    """

    def __init__(self) -> None:
        self.typed = ""
        self.interrupts = 0
        self.leave = False
        self._last = 0.0
        self._hung_up = False
        self._fd = sys.stdin.fileno() if sys.stdin is not None and sys.stdin.isatty() else None
        self._saved: list[Any] | None = None
        self._handlers: dict[int, SignalHandler] = {}

    @property
    def has_keyboard(self) -> bool:
        """Whether there is a keyboard."""
        return self._fd is not None

    def __enter__(self) -> AnswerKeys:
        self._handlers[signal.SIGINT] = signal.signal(signal.SIGINT, self._on_interrupt)
        if self._fd is not None:
            self._saved = termios.tcgetattr(self._fd)
            # a shell sets the terminal as it likes while this is stopped by Ctrl+Z
            self._handlers[signal.SIGCONT] = signal.signal(signal.SIGCONT, lambda *_: self._stop_echo())
            self._stop_echo()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._fd is not None and self._saved is not None:
            termios.tcsetattr(self._fd, termios.TCSADRAIN, self._saved)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def read_pressed(self) -> list[str]:
        """Return ENTER and TOGGLE as often as they were pressed since the last call; other keys go to `typed`."""
        found = []
        while self._fd is not None and not self._hung_up and select.select([self._fd], [], [], 0)[0]:
            try:
                data = os.read(self._fd, 1024)
            except OSError:
                data = b""
            self._hung_up = not data  # then it is always ready, and there is nothing to read
            text = _ESCAPE.sub("", data.decode(errors="replace"))
            found += [key for key in text.replace("\r", "\n") if key in (ENTER, TOGGLE)]
            self._add_typed(text)
        return found

    def _add_typed(self, text: str) -> None:
        for char in text:
            if char in "\x7f\b":
                self.typed = self.typed[:-1]
            elif char.isprintable():
                self.typed += char

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        self.leave = self.interrupts > 0 and now - self._last < AGAIN_SECONDS
        self.interrupts += 1
        self._last = now

    def _stop_echo(self) -> None:
        """Have keys come one by one and unseen; Ctrl+C and Ctrl+Z stay signals."""
        if self._fd is None:
            return
        mode = termios.tcgetattr(self._fd)
        mode[3] &= ~(termios.ICANON | termios.ECHO | termios.IEXTEN)
        mode[3] |= termios.NOFLSH  # what was typed before Ctrl+C is kept
        mode[6][termios.VMIN], mode[6][termios.VTIME] = 1, 0
        termios.tcsetattr(self._fd, termios.TCSADRAIN, mode)


def exit_program(code: int) -> None:
    """Leave the program with this exit code."""
    raise SystemExit(code)


@contextmanager
def ending_on_signals(end: Callable[[int], None] = exit_program) -> Iterator[None]:
    """Have SIGTERM and SIGHUP end the program in an orderly way: `end` is called with the exit code."""
    before: dict[signal.Signals, SignalHandler] = {}
    for number in (signal.SIGTERM, signal.SIGHUP):
        before[number] = signal.signal(number, lambda got, _: end(128 + got))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
