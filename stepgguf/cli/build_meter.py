"""Progress of a build: its stage, the steps of the compilation, the time so far, and an estimate of what is left."""

from __future__ import annotations

import time
from types import TracebackType

from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from stepgguf.cli import output
from stepgguf.cli.progress import clock
from stepgguf.setup.output import BuildProgress

_PLAIN_SECONDS = 15.0  # between two lines where there is no terminal
_MIN_STEPS = 10  # before these, an estimate says nothing


class BuildMeter:
    """Shows the output of a build as a bar on a terminal, and elsewhere as a line now and then.

    Use as a context manager; `show` takes each line of the output.
    """

    def __init__(self, title: str) -> None:
        self._title = title
        self._build = BuildProgress()
        self._began = self._last_line = time.monotonic()
        self._compiling_since: float | None = None
        self._live = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[steps]}"),
            TimeElapsedColumn(),
            _TimeLeft(),
            console=output.stderr,
            transient=True,
            refresh_per_second=2,  # the processors are wanted elsewhere
            disable=not output.stderr.is_terminal,
        )
        self._task = self._live.add_task(title, total=None, steps="", end=None)

    def __enter__(self) -> BuildMeter:
        output.note(f"{self._title} ...")
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()
        if error is None:
            output.note(f"{self._title}: done in {clock(time.monotonic() - self._began)}")

    def show(self, line: str) -> None:
        """Take in a line of the output, and show how far the build is."""
        build = self._build
        build.read(line)
        now = time.monotonic()
        if build.n_steps and self._compiling_since is None:
            self._compiling_since = now
        end = self._estimate_end(now)
        steps = f"{build.n_done}/{build.n_steps}" if build.n_steps else ""
        self._live.update(
            self._task, completed=build.n_done, total=build.n_steps or None, description=build.stage, steps=steps,
            end=end,
        )  # fmt: skip
        if not output.stderr.is_terminal and now - self._last_line >= _PLAIN_SECONDS:
            self._last_line = now
            parts = (f"{build.stage} {steps}".strip(), f"{clock(now - self._began)} so far", time_left(end))
            output.note(f"{self._title}: {', '.join(filter(None, parts))}")

    def _estimate_end(self, now: float) -> float | None:
        """By the rate of the compilation's own steps, of which the later ones take a little longer."""
        build = self._build
        if self._compiling_since is None or build.n_done < _MIN_STEPS:
            return None
        return now + (now - self._compiling_since) / build.n_done * (build.n_steps - build.n_done)


class _TimeLeft(ProgressColumn):
    """Counts down also between two lines of the output."""

    def render(self, task: Task) -> Text:
        return Text(time_left(task.fields["end"]))


def time_left(end: float | None) -> str:
    """How long it is until a time of the monotonic clock; empty where that is not known yet."""
    return "" if end is None else f"about {clock(max(0.0, end - time.monotonic()))} left"
