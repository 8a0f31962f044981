"""Progress over a known number of bytes, or of anything else that is counted.

On a terminal: two live lines, the whole (bytes, rate, time left) and the current layer. Piped: a plain line now and
then. --quiet: neither.
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING

from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from stepgguf.cli import output
from stepgguf.files.byte_sizes import readable_size
from stepgguf.model.names import TensorName

if TYPE_CHECKING:
    from stepgguf.convert.pipeline import UnitProgress

PLAIN_SECONDS = 5.0  # between two plain progress lines


class ProgressMeter:
    """Progress over a known number of output bytes. Use as a context manager; call `add_unit` or `add_bytes`.

    live: the bars, on a terminal. layers: bytes of each layer, for a second bar.

    Rate and time left are those of this run: the clock starts when its first unit is done, and again after a kernel was
    compiled, so that neither what an earlier run did nor the compiler counts.
    """

    def __init__(self, title: str, total: int, *, quiet: bool = False, layers: dict[str, int] | None = None) -> None:
        self._title, self._total, self._quiet, self._layers = title, total, quiet, layers
        self.live = None if quiet or not output.stderr.is_terminal else _live_bars()
        self._whole: TaskID | None = None
        self._layer: TaskID | None = None
        self._layer_name = ""
        self._seen: dict[str, int] = {}
        self._clock: tuple[float, int] | None = None  # when it was started, and what was done then
        self._compiling: float | None = None  # since when
        self._last_line = time.monotonic()
        self.bytes_done = self.bytes_resumed = 0
        self.compile_seconds = 0.0

    def __enter__(self) -> ProgressMeter:
        if self.live is not None:
            self.live.start()
            self._whole = self.live.add_task(self._title, total=self._total)
            if self._layers:
                self._layer = self.live.add_task("", total=None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live is not None:
            self.live.stop()

    def add_unit(self, done: UnitProgress) -> None:
        """Count a finished unit of a conversion, and show its layer."""
        layer = layer_name(done.tensor.name)
        self._seen[layer] = self._seen.get(layer, 0) + done.n_bytes
        if self.live is not None and self._layer is not None and self._layers:
            if layer != self._layer_name and not done.resumed:
                self._layer_name = layer
                self.live.reset(self._layer, total=self._layers[layer], description=f"  {layer}")
            self.live.update(self._layer, completed=self._seen.get(self._layer_name, 0))
        self.add_bytes(done.n_bytes, earlier=done.resumed)

    def note_compiling(self, name: str) -> None:
        """Say that a kernel is about to be compiled, and stop the clock until the next unit is done."""
        self._compiling = self._compiling or time.monotonic()
        if not self._quiet:
            say_compiling(name)

    def add_bytes(self, n_bytes: int, *, earlier: bool = False) -> None:
        """Count bytes that are done; `earlier`: by an earlier run, so that they say nothing of this one's rate."""
        now = time.monotonic()
        self.bytes_done += n_bytes
        if earlier:
            self.bytes_resumed += n_bytes
        elif self._clock is None or self._compiling is not None:  # what came before would spoil the rate: start anew
            self.compile_seconds += now - (self._compiling or now)
            self._clock, self._compiling = (now, self.bytes_done), None
            if self.live is not None and self._whole is not None:
                self.live.reset(self._whole, total=self._total, completed=self.bytes_done)
        if self.live is not None and self._whole is not None:
            self.live.update(self._whole, completed=self.bytes_done)
        elif not self._quiet and self._clock is not None:
            self._print_plain_line(now, *self._clock)

    def _print_plain_line(self, now: float, started: float, before: int) -> None:
        """At most one line in PLAIN_SECONDS; `before` bytes were done when the clock was started."""
        if now - self._last_line < PLAIN_SECONDS or self.bytes_done == before:
            return
        self._last_line = now
        rate = (self.bytes_done - before) / (now - started)
        left = (self._total - self.bytes_done) / rate
        output.note(
            f"{self._title}: {self.bytes_done / self._total:.0%} of {readable_size(self._total)}, "
            f"{rate / 1e6:.0f} MB/s, {clock(left)} left"
        )


class CountMeter:
    """Progress over a known number of things of one kind. Use as a context manager; call `add`.

    noun: what is counted, as "predictions".
    """

    def __init__(self, title: str, total: int, noun: str, *, quiet: bool = False) -> None:
        self._title, self.total, self._noun, self._quiet = title, total, noun, quiet
        columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TextColumn(noun + ", ETA"))
        shown = not quiet and output.stderr.is_terminal
        self._live = Progress(*columns, TimeRemainingColumn(), console=output.stderr, transient=True, disable=not shown)
        self._task = self._live.add_task(title, total=total)
        self._started = self._last_line = time.monotonic()
        self._done = 0

    def __enter__(self) -> CountMeter:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def add(self, n: int) -> None:
        """Count n more that are done. Piped, that is a line at most every PLAIN_SECONDS."""
        self._done += n
        self._live.update(self._task, completed=self._done)
        now = time.monotonic()
        if self._quiet or output.stderr.is_terminal or not self._done or now - self._last_line < PLAIN_SECONDS:
            return
        self._last_line = now
        left = (now - self._started) / self._done * (self.total - self._done)
        output.note(f"{self._title}: {self._done / self.total:.0%} of {self.total:,} {self._noun}, {clock(left)} left")


def say_compiling(name: str) -> None:
    """Say that a type's kernel is about to be compiled."""
    output.note(f"compiling the {name} kernel (once on this machine)")


def clock(seconds: float) -> str:
    """A time as m:ss, or as h:mm:ss from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours = f"{minutes // 60}:" if minutes >= 60 else ""
    return f"{hours}{minutes % 60:0{2 if hours else 1}d}:{rest:02d}"


def layer_name(tensor: str) -> str:
    """The layer that a tensor is shown under: "blk.7", or "other tensors" outside the layers."""
    layer = TensorName(tensor).layer
    return "other tensors" if layer is None else f"blk.{layer}"


def _live_bars() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=output.stderr,
        transient=True,
    )
