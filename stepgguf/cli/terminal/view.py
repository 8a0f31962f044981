"""The updates of an answer, on the screen or into a pipe.

Queued, Prefill   a row that goes away
reasoning         folded: one row, then a line that stays; full: dim, behind a gutter; hidden: a row that goes away
text              Markdown by blocks, the block under way as it is; or plain
call, arguments   a row, then a line that stays
"""

from __future__ import annotations

import time
from typing import Literal, TextIO, get_args

from stepgguf.chat.output import Delta
from stepgguf.cli.terminal import footer
from stepgguf.cli.terminal.live import Live, fit, printable, wrap
from stepgguf.cli.terminal.markdown import Blocks, Renderer
from stepgguf.conversation.records import Usage
from stepgguf.conversation.session import Update
from stepgguf.runtime.engine import Prefill, Queued

Thinking = Literal["full", "fold", "hide"]
THINKING: tuple[Thinking, ...] = get_args(Thinking)
_DIM, _DIM_ITALIC, _CALL, _WARNING = "2", "2;3", "36", "33"
_GUTTER = "│ "
_PAINT_SECONDS = 0.03
_PATIENCE = 0.3  # seconds before a prompt that is being read is worth a row
_BAR = 20  # cells
_MIN_TAIL = 12  # cells that a glimpse of the thinking must have


class Screen:
    """A terminal. `pipe`: the answer goes there as it is, and the terminal shows only what happens before it."""

    def __init__(
        self, live: Live, thinking: Thinking, *, renderer: Renderer | None, pipe: TextIO | None = None
    ) -> None:
        self.live, self.thinking = live, thinking
        self._markdown, self._pipe = renderer, pipe
        self.hint = ""  # after folded thinking: how to see it
        self.start()

    def start(self, *, keys: bool = False, raw: bool = False) -> None:
        """A new answer. keys: somebody can press Enter. raw: it is no Markdown."""
        self._keys = keys
        self._renderer = None if raw else self._markdown
        self._kind = ""
        self._thoughts = ""
        self._n_shown = 0  # characters of the thoughts that were written in full
        self._blocks = Blocks()
        self._started = self._painted = self._prefill_since = time.monotonic()
        self._reasoning_since = 0.0
        self._prefill: Prefill | None = None
        self._queued: Queued | None = None
        self._call = ""
        self._wrote = False  # something of the answer
        self._in_line = False

    def take(self, update: Update | None, usage: Usage) -> None:
        if isinstance(update, Queued):
            self._queued = update
        elif isinstance(update, Prefill):
            if self._prefill is None:
                self._prefill_since = time.monotonic()
            self._prefill = update
        elif isinstance(update, Delta):
            self._delta(update, usage)
        if time.monotonic() - self._painted >= _PAINT_SECONDS:
            self._paint(usage)

    @property
    def is_reasoning(self) -> bool:
        return self._kind == "reasoning"

    def toggle(self) -> None:
        """Between folded and full thinking."""
        self.thinking = "fold" if self.thinking == "full" else "full"

    def finish(self, usage: Usage) -> None:
        """The answer is over, or was stopped."""
        self._leave(usage)
        if not self._kind:
            self.live.clear()

    def footer(self, usage: Usage, max_tokens: int | None) -> None:
        if self._pipe is None:  # whoever reads the pipe may write to this terminal right now
            lines = _joined(footer.counts(usage), self.live.width)
            self.live.commit("\n" + "\n".join(self.live.style(_DIM, line) for line in lines))
        self.remark(*footer.remarks(usage, max_tokens))

    def note(self, text: str) -> None:
        rows = [row for line in printable(text).split("\n") for row in wrap(line, self.live.width)]
        self.live.commit("\n".join(self.live.style(_DIM, row) for row in rows))

    def remark(self, *texts: str) -> None:
        for text in texts:
            self.live.commit(self.live.style(_WARNING, printable(text)))

    def markdown(self, text: str) -> None:
        """A whole text at once."""
        self.start()
        self._text(text)
        self._leave(Usage())

    def thoughts(self, text: str) -> None:
        """A whole thinking at once."""
        self.live.commit("\n".join(self._gutter(printable(text).strip("\n"))))

    # kinds of deltas ------------------------------------------------------------------------------------------------

    def _delta(self, delta: Delta, usage: Usage) -> None:
        if delta.kind not in (self._kind, "arguments"):
            self._leave(usage)
            self._kind = delta.kind
            self._painted = 0.0
        if delta.kind == "reasoning":
            self._reasoning_since = self._reasoning_since or time.monotonic()
            self._thoughts += printable(delta.text)
        elif delta.kind == "text":
            self._text(printable(delta.text) if self._pipe is None else delta.text)
        elif delta.kind == "call":
            self._call = printable(delta.text) + " "
        else:
            self._call += printable(delta.text)

    def _leave(self, usage: Usage) -> None:
        """The kind that was coming is over."""
        if self._kind == "reasoning":
            self._end_reasoning(usage)
        elif self._kind == "text":
            self._end_text()
        elif self._kind == "call":
            self.live.commit(self.live.style(_CALL, f"→ {self._call}"))

    def _end_reasoning(self, usage: Usage) -> None:
        seconds = time.monotonic() - self._reasoning_since
        if self.thinking == "full":
            rest, self._n_shown = self._thoughts[self._n_shown :], len(self._thoughts)
            self.live.commit("\n".join(self._gutter(rest)))
        elif self.thinking == "fold" and self._pipe is None:
            line = f"∴ thought for {seconds:.1f}s, {usage.n_reasoning:,} tokens{self.hint}"
            self.live.commit(self.live.style(_DIM, fit(line, self.live.width)))
        else:
            self.live.clear()

    def _text(self, text: str) -> None:
        if self._pipe is not None:
            self.live.clear()
            self._pipe.write(text)
            self._pipe.flush()
        elif self._renderer is None:
            self.live.write(text if self._wrote else "\n" + text)
        else:
            for block in self._blocks.feed(text):
                self._block(block)
        self._wrote = True
        self._in_line = not text.endswith("\n")
        self._kind = "text"

    def _end_text(self) -> None:
        for block in self._blocks.finish():
            self._block(block)
        if self._renderer is None and self._in_line:
            if self._pipe is not None:
                self._pipe.write("\n")
                self._pipe.flush()
            else:
                self.live.write("\n")
        self._wrote = False

    def _block(self, block: str) -> None:
        assert self._renderer is not None
        self.live.commit("\n" + self._renderer.render(block, self.live.width))

    # rows -----------------------------------------------------------------------------------------------------------

    def _paint(self, usage: Usage) -> None:
        self._painted = time.monotonic()
        if self._kind == "reasoning" and self.thinking == "full":
            *lines, rest = self._thoughts[self._n_shown :].split("\n")
            rows = self._gutter(rest)
            if lines:
                self._n_shown = len(self._thoughts) - len(rest)
                self.live.commit("\n".join(self._gutter("\n".join(lines))), rows)
            else:
                self.live.show(rows)
        elif self._kind == "reasoning":
            self.live.show([self.live.style(_DIM, self._reasoning_row(usage))])
        elif self._kind == "text":
            if self._renderer is not None and self._pipe is None:
                rows = [row for line in self._blocks.rest.split("\n") for row in wrap(line, self.live.width)]
                self.live.show(["", *rows])
        elif self._kind == "call":
            self.live.show([self.live.style(_CALL, fit(f"→ {self._call}", self.live.width))])
        elif time.monotonic() - self._started > _PATIENCE:
            self.live.show([self.live.style(_DIM, fit(self._waiting_row(), self.live.width))])

    def _gutter(self, text: str) -> list[str]:
        width = self.live.width - len(_GUTTER)
        rows = [row for line in text.split("\n") for row in wrap(line, width)]
        return [self.live.style(_DIM, _GUTTER) + self.live.style(_DIM_ITALIC, row) for row in rows]

    def _reasoning_row(self, usage: Usage) -> str:
        seconds = time.monotonic() - self._reasoning_since
        row, width = f"∴ thinking {seconds:.1f}s", self.live.width
        parts = [f"{usage.n_reasoning:,} tok"]
        if seconds > 1:
            parts.append(f"{usage.n_reasoning / seconds:.0f} t/s")
        if self._keys:
            parts.append("Enter: answer now")
        for part in parts:
            if len(row) + 3 + len(part) <= width:
                row += f" · {part}"
        room = width - len(row) - 6
        if self.thinking == "fold" and room >= _MIN_TAIL:
            words = " ".join(self._thoughts[-2 * room :].split())
            while len(words) > room or fit(words, room) != words:
                words = words[1:]
            row += f' · "…{words}"'
        return fit(row, width)

    def _waiting_row(self) -> str:
        seconds = time.monotonic() - self._started
        if self._prefill is None:
            if self._queued is not None:
                return f"waiting for {self._queued.n_ahead + 1} other requests, {seconds:.0f}s"
            return f"waiting, {seconds:.0f}s"
        done, total, cached = self._prefill.n_done, self._prefill.n_prompt, self._prefill.n_cached
        filled = _BAR * done // max(1, total)
        row = f"reading {'━' * filled}{'╌' * (_BAR - filled)} {done:,}/{total:,} tokens"
        if done > cached:
            rate = (done - cached) / (time.monotonic() - self._prefill_since)
            row += f" · {rate:,.0f} t/s · {(total - done) / rate:.0f}s left"
        return row + (f" · {cached:,} cached" if cached else "")


class Pipe:
    """No terminal anywhere: the answer to one file; full thinking, counts and remarks to another, or nowhere."""

    def __init__(self, out: TextIO, err: TextIO, *, thinking: Thinking) -> None:
        self.thinking = thinking
        self._out, self._err = out, err
        self.start()

    def start(self, *, keys: bool = False, raw: bool = False) -> None:
        self._last: dict[str, str] = {}

    def take(self, update: Update | None, usage: Usage) -> None:
        if not isinstance(update, Delta) or (update.kind == "reasoning" and self.thinking != "full"):
            return
        if update.kind == "text" and "text" not in self._last:
            self._end_lines()  # of the thinking: both may go to one place
        file = self._out if update.kind == "text" else self._err
        file.write(update.text)
        file.flush()
        self._last[update.kind] = update.text

    @property
    def is_reasoning(self) -> bool:
        return bool(self._last) and "text" not in self._last

    def toggle(self) -> None:
        """There is nothing to fold."""

    def finish(self, usage: Usage) -> None:
        self._end_lines()
        self._last = {}

    def _end_lines(self) -> None:
        for kind, text in self._last.items():
            file = self._out if kind == "text" else self._err
            file.write("" if text.endswith("\n") else "\n")
            file.flush()
            self._last[kind] = "\n"

    def footer(self, usage: Usage, max_tokens: int | None) -> None:
        self._err.write(" · ".join(footer.counts(usage)) + "\n")
        self.remark(*footer.remarks(usage, max_tokens))

    def remark(self, *texts: str) -> None:
        for text in texts:
            self._err.write(f"{text}\n")


def _joined(parts: list[str], width: int) -> list[str]:
    """Parts with dots between them, in as many lines as it takes."""
    lines = [parts[0]]
    for part in parts[1:]:
        if len(lines[-1]) + 3 + len(part) <= width:
            lines[-1] += f" · {part}"
        else:
            lines.append(part)
    return lines
