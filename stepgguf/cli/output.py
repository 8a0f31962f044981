"""What the terminal shows. stdout is data, stderr is everything else.

On a terminal: two live lines, the whole (bytes, rate, time left) and the current layer. Piped: a plain line now and
then. --quiet: neither.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

from stepgguf.model.names import TensorName

if TYPE_CHECKING:
    from stepgguf.convert.fold import Line
    from stepgguf.convert.pipeline import UnitProgress

stdout = Console(highlight=False)
stderr = Console(stderr=True, highlight=False)
_FLOATS = ("F32", "F16", "BF16")
PLAIN_SECONDS = 5.0  # between two plain progress lines


def error(message: str, hint: str | None) -> None:
    stderr.print(f"[bold red]error:[/] {_escape(message)}", soft_wrap=True)
    if hint:
        stderr.print(f"[bold]hint:[/] {_escape(hint)}", soft_wrap=True)


def warn(messages: Iterable[str]) -> None:
    for message in messages:
        stderr.print(f"[yellow]warning:[/] {_escape(message)}", soft_wrap=True)


def note(message: str) -> None:
    stderr.print(_escape(message), soft_wrap=True)


def data(value: Any) -> None:
    """JSON to stdout, escaped where its encoding has not every character."""
    ascii_only = "utf" not in (sys.stdout.encoding or "utf-8").lower()
    sys.stdout.write(json.dumps(value, indent=1, ensure_ascii=ascii_only) + "\n")


def lines(texts: Iterable[str]) -> None:
    """Text to stdout."""
    sys.stdout.write("".join(f"{text}\n" for text in texts))


def size(n: int) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n >= scale:
            return f"{n / scale:.1f} {unit}" if n >= 10 * scale else f"{n / scale:.2f} {unit}"
    return f"{n} B"


def show(texts: Iterable[Text]) -> None:
    """Lines to stdout, with their colours if it is a terminal."""
    for text in texts:
        stdout.print(text, soft_wrap=True)


def table(lines: Iterable[Line]) -> str:
    """`columns` as plain text."""
    return "\n".join(text.plain for text in columns(lines))


def columns(lines: Iterable[Line]) -> list[Text]:
    """Folded tensors, one a line: label, count, type, size, bits per weight, reason."""
    rows = [
        (
            line.label,
            f"{line.count}x",
            line.type,
            size(line.n_bytes),
            f"{line.n_bytes * 8 / line.n_values:.2f}",
            line.reason,
        )
        for line in lines
    ]
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(5)]
    return [
        Text.assemble(
            f"{a:<{widths[0]}}  {b:>{widths[1]}}  ",
            (f"{c:<{widths[2]}}", "dim" if c in _FLOATS else "cyan"),
            f"  {d:>{widths[3]}}  {e:>{widths[4]}}",
            (f"  {f}".rstrip(), "dim"),
        )
        for a, b, c, d, e, f in rows
    ]


class Meter:
    """Progress over a known number of output bytes. Use as a context manager; call `unit` or `step`.

    Rate and time left are those of this run: the clock starts when its first unit is done, and again after a kernel was
    compiled, so that neither what an earlier run did nor the compiler counts.
    """

    def __init__(self, title: str, total: int, *, quiet: bool = False, layers: dict[str, int] | None = None) -> None:
        self._title, self._total, self._quiet, self._layers = title, total, quiet, layers
        self._live = None if quiet or not stderr.is_terminal else _live()
        self._whole: TaskID | None = None
        self._layer: TaskID | None = None
        self._layer_name = ""
        self._seen: dict[str, int] = {}
        self._clock: tuple[float, int] | None = None  # when it was started, and what was done then
        self._compiling: float | None = None  # since when
        self._last_line = time.monotonic()
        self.done = self.resumed = 0
        self.compile_seconds = 0.0

    def __enter__(self) -> Meter:
        if self._live is not None:
            self._live.start()
            self._whole = self._live.add_task(self._title, total=self._total)
            if self._layers:
                self._layer = self._live.add_task("", total=None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def unit(self, done: UnitProgress) -> None:
        """A finished unit of a conversion."""
        layer = layer_name(done.tensor.name)
        self._seen[layer] = self._seen.get(layer, 0) + done.n_bytes
        if self._live is not None and self._layer is not None and self._layers:
            if layer != self._layer_name and not done.resumed:
                self._layer_name = layer
                self._live.reset(self._layer, total=self._layers[layer], description=f"  {layer}")
            self._live.update(self._layer, completed=self._seen.get(self._layer_name, 0))
        self.step(done.n_bytes, earlier=done.resumed)

    def compiling(self, name: str) -> None:
        """A kernel is about to be compiled."""
        self._compiling = self._compiling or time.monotonic()
        if not self._quiet:
            note(f"compiling the {name} kernel (once on this machine)")

    def step(self, n_bytes: int, *, earlier: bool = False) -> None:
        """So many bytes are done; `earlier`: by an earlier run."""
        now = time.monotonic()
        self.done += n_bytes
        if earlier:
            self.resumed += n_bytes
        elif self._clock is None or self._compiling is not None:
            self.compile_seconds += now - (self._compiling or now)
            self._clock, self._compiling = (now, self.done), None
            if self._live is not None and self._whole is not None:
                self._live.reset(self._whole, total=self._total, completed=self.done)
        if self._live is not None and self._whole is not None:
            self._live.update(self._whole, completed=self.done)
        elif not self._quiet and self._clock is not None:
            self._plain(now, *self._clock)

    def _plain(self, now: float, started: float, before: int) -> None:
        if now - self._last_line < PLAIN_SECONDS or self.done == before:
            return
        self._last_line = now
        rate = (self.done - before) / (now - started)
        left = (self._total - self.done) / rate
        note(
            f"{self._title}: {self.done / self._total:.0%} of {size(self._total)}, {rate / 1e6:.0f} MB/s, "
            f"{int(left // 60)}:{int(left % 60):02d} left"
        )


def layer_name(tensor: str) -> str:
    """ "blk.7", or "other tensors" outside the layers."""
    layer = TensorName(tensor).layer
    return "other tensors" if layer is None else f"blk.{layer}"


def _live() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=stderr,
        transient=True,
    )


def _escape(text: str) -> str:
    return text.replace("[", r"\[")
