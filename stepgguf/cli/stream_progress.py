"""Progress of a layer stream: which layer runs, what share of the multiplications is done, how long the rest takes."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING

from rich.progress import BarColumn, Progress, TextColumn

from stepgguf.cli import output
from stepgguf.cli.progress import PLAIN_SECONDS, clock

if TYPE_CHECKING:
    from stepgguf.reference.stream import LayerProgress


class StreamMeter:
    """Shows the progress of streams, one after the other: on a terminal as a bar, piped as a line now and then.

    Use as a context manager; `restart` before each stream, `show` is what a stream calls. The time left is by the rate
    of this run: what an earlier one did says nothing of it.
    """

    def __init__(self, title: str, *, quiet: bool = False) -> None:
        self._title, self._is_quiet = title, quiet
        self._live = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %  {task.fields[left]}"),
            console=output.stderr,
            transient=True,
            disable=quiet or not output.stderr.is_terminal,
        )
        self._task = self._live.add_task(title, total=None, left="")
        self.restart()

    def __enter__(self) -> StreamMeter:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def restart(self) -> None:
        """Start the clock of a stream."""
        self.share = 0.0
        self._started = self._last_line = time.monotonic()

    def show(self, at: LayerProgress) -> None:
        """Show how far the stream is. Piped, that is a line at most every PLAIN_SECONDS."""
        now, done = time.monotonic(), at.done - at.earlier
        self.share = at.done / at.total
        layer = "head" if at.layer is None else f"layer {at.layer}"
        left = f"{clock((at.total - at.done) / done * (now - self._started))} left" if done else ""
        self._live.update(
            self._task, total=at.total, completed=at.done, description=f"{self._title}: {layer}", left=left
        )
        if self._is_quiet or output.stderr.is_terminal or not done or now - self._last_line < PLAIN_SECONDS:
            return
        self._last_line = now
        output.note(f"{self._title}: {layer}, {self.share:.0%}, {left}")
