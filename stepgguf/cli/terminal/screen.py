"""An answer on a terminal, while it comes.

Queued, Prefill   a row that goes away
reasoning         folded: one row, then a line that stays; full: dim, behind a gutter; hidden: a row that goes away
text              Markdown by blocks, the block under way as it is; or plain
call, arguments   a row, then a line that stays
"""

from __future__ import annotations

import base64
import time
from typing import TextIO

from stepgguf.chat.output import Delta
from stepgguf.cli.output import counted
from stepgguf.cli.terminal import footer
from stepgguf.cli.terminal.live import LiveRows, cut_to_width, strip_controls, wrap_line
from stepgguf.cli.terminal.markdown import MarkdownBlocks, MarkdownRenderer
from stepgguf.cli.terminal.view import ReasoningDisplay
from stepgguf.conversation.records import AnswerUsage
from stepgguf.conversation.session import Update
from stepgguf.runtime.engine import Prefill, Queued

_DIM, _DIM_ITALIC, _CALL, _WARNING = "2", "2;3", "36", "33"
_GUTTER = "│ "
_PAINT_SECONDS = 0.03
_PATIENCE = 0.3  # seconds before a prompt that is being read is worth a row
_BAR = 20  # cells
_MIN_TAIL = 12  # cells that a glimpse of the reasoning must have


class Screen:
    """An AnswerView on a terminal. renderer: of Markdown; where it is None, text is shown as it is.

    pipe: the answer goes there as it is, and the terminal shows only what happens before it.
    """

    def __init__(
        self,
        live: LiveRows,
        reasoning_display: ReasoningDisplay,
        *,
        renderer: MarkdownRenderer | None,
        pipe: TextIO | None = None,
    ) -> None:
        self.live, self.reasoning_display = live, reasoning_display
        self._markdown, self._pipe = renderer, pipe
        self.hint = ""  # after folded reasoning: how to see it
        self.start()

    def start(self, *, keys: bool = False, raw: bool = False) -> None:
        """Be ready for a new answer. keys: somebody can press Enter. raw: it is no Markdown."""
        self._keys = keys
        self._renderer = None if raw else self._markdown
        self._kind = ""  # of the deltas that come
        self._reasoning = ""
        self._n_shown = 0  # characters of the reasoning that were written in full
        self._blocks = MarkdownBlocks()
        self._started = self._painted = self._prefill_since = time.monotonic()
        self._reasoning_since = 0.0
        self._prefill: Prefill | None = None
        self._queued: Queued | None = None
        self._call = ""
        self._wrote = False  # something of the answer
        self._in_line = False

    def take(self, update: Update | None, usage: AnswerUsage) -> None:
        """Show what an update brings; None: nothing came, and what moves by itself is drawn again."""
        if isinstance(update, Queued):
            self._queued = update
        elif isinstance(update, Prefill):
            if self._prefill is None:
                self._prefill_since = time.monotonic()
            self._prefill = update
        elif isinstance(update, Delta):
            self._take_delta(update, usage)
        if time.monotonic() - self._painted >= _PAINT_SECONDS:
            self._paint(usage)

    @property
    def is_reasoning(self) -> bool:
        return self._kind == "reasoning"

    def toggle_reasoning(self) -> None:
        """Change between folded and full reasoning."""
        self.reasoning_display = "fold" if self.reasoning_display == "full" else "full"

    def finish(self, usage: AnswerUsage) -> None:
        """Take the answer for over, or stopped."""
        self._end_kind(usage)
        if not self._kind:
            self.live.clear()

    def show_footer(self, usage: AnswerUsage, max_tokens: int | None) -> None:
        """Show the counts of an answer, and what there is to say about how it ended."""
        if self._pipe is None:  # whoever reads the pipe may write to this terminal right now
            lines = _join_parts(footer.usage_parts(usage), self.live.width)
            self.live.commit("\n" + "\n".join(self.live.style(_DIM, line) for line in lines))
        self.remark(*footer.ending_remarks(usage, max_tokens))

    def note(self, text: str) -> None:
        """Show text of our own, dim."""
        rows = [row for line in strip_controls(text).split("\n") for row in wrap_line(line, self.live.width)]
        self.live.commit("\n".join(self.live.style(_DIM, row) for row in rows))

    def remark(self, *texts: str) -> None:
        """Show what the user should know, in the color of warnings."""
        for text in texts:
            self.live.commit(self.live.style(_WARNING, strip_controls(text)))

    def show_markdown(self, text: str) -> None:
        """Show a whole text at once."""
        self.start()
        self._show_text(text)
        self._end_kind(AnswerUsage())

    def show_reasoning(self, text: str) -> None:
        """Show all reasoning of an answer at once, unfolded."""
        self.live.commit("\n".join(self._gutter_rows(strip_controls(text).strip("\n"))))

    def copy_to_clipboard(self, text: str) -> None:
        """Copy by OSC 52, which also works over ssh, where the terminal allows it."""
        self.live.write(f"\x1b]52;c;{base64.b64encode(text.encode()).decode()}\x07")

    # kinds of deltas ------------------------------------------------------------------------------------------------

    def _take_delta(self, delta: Delta, usage: AnswerUsage) -> None:
        if delta.kind not in (self._kind, "arguments"):
            self._end_kind(usage)
            self._kind = delta.kind
            self._painted = 0.0
        if delta.kind == "reasoning":
            self._reasoning_since = self._reasoning_since or time.monotonic()
            self._reasoning += strip_controls(delta.text)
        elif delta.kind == "text":
            self._show_text(strip_controls(delta.text) if self._pipe is None else delta.text)
        elif delta.kind == "call":
            self._call = strip_controls(delta.text) + " "
        else:
            self._call += strip_controls(delta.text)

    def _end_kind(self, usage: AnswerUsage) -> None:
        """Finish what was coming: another kind comes, or nothing."""
        if self._kind == "reasoning":
            self._end_reasoning(usage)
        elif self._kind == "text":
            self._end_text()
        elif self._kind == "call":
            self.live.commit(self.live.style(_CALL, f"→ {self._call}"))

    def _end_reasoning(self, usage: AnswerUsage) -> None:
        seconds = time.monotonic() - self._reasoning_since
        if self.reasoning_display == "full":
            rest, self._n_shown = self._reasoning[self._n_shown :], len(self._reasoning)
            self.live.commit("\n".join(self._gutter_rows(rest)))
        elif self.reasoning_display == "fold" and self._pipe is None:  # before a pipe there is no line that stays
            line = f"∴ thought for {seconds:.1f}s, {usage.n_reasoning:,} tokens{self.hint}"
            self.live.commit(self.live.style(_DIM, cut_to_width(line, self.live.width)))
        else:
            self.live.clear()

    def _show_text(self, text: str) -> None:
        if self._pipe is not None:
            self.live.clear()  # the terminal may be the pipe's other end
            self._pipe.write(text)
            self._pipe.flush()
        elif self._renderer is None:
            self.live.write(text if self._wrote else "\n" + text)
        else:
            for block in self._blocks.feed(text):
                self._show_block(block)
        self._wrote = True
        self._in_line = not text.endswith("\n")
        self._kind = "text"

    def _end_text(self) -> None:
        for block in self._blocks.finish():
            self._show_block(block)
        if self._renderer is None and self._in_line:  # rendered blocks end their lines themselves
            if self._pipe is not None:
                self._pipe.write("\n")
                self._pipe.flush()
            else:
                self.live.write("\n")
        self._wrote = False

    def _show_block(self, block: str) -> None:
        assert self._renderer is not None
        self.live.commit("\n" + self._renderer.render(block, self.live.width))

    # rows -----------------------------------------------------------------------------------------------------------

    def _paint(self, usage: AnswerUsage) -> None:
        self._painted = time.monotonic()
        if self._kind == "reasoning" and self.reasoning_display == "full":
            # whole lines are written once and stay; the one under way is drawn again and again
            *lines, rest = self._reasoning[self._n_shown :].split("\n")
            rows = self._gutter_rows(rest)
            if lines:
                self._n_shown = len(self._reasoning) - len(rest)
                self.live.commit("\n".join(self._gutter_rows("\n".join(lines))), rows)
            else:
                self.live.show_rows(rows)
        elif self._kind == "reasoning":
            self.live.show_rows([self.live.style(_DIM, self._reasoning_row(usage))])
        elif self._kind == "text":
            if self._renderer is not None and self._pipe is None:
                rows = [row for line in self._blocks.rest.split("\n") for row in wrap_line(line, self.live.width)]
                self.live.show_rows(["", *rows])
        elif self._kind == "call":
            self.live.show_rows([self.live.style(_CALL, cut_to_width(f"→ {self._call}", self.live.width))])
        elif time.monotonic() - self._started > _PATIENCE:  # nothing of the answer has come
            self.live.show_rows([self.live.style(_DIM, cut_to_width(self._waiting_row(), self.live.width))])

    def _gutter_rows(self, text: str) -> list[str]:
        width = self.live.width - len(_GUTTER)
        rows = [row for line in text.split("\n") for row in wrap_line(line, width)]
        return [self.live.style(_DIM, _GUTTER) + self.live.style(_DIM_ITALIC, row) for row in rows]

    def _reasoning_row(self, usage: AnswerUsage) -> str:
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
        if self.reasoning_display == "fold" and room >= _MIN_TAIL:
            words = " ".join(self._reasoning[-2 * room :].split())
            while len(words) > room or cut_to_width(words, room) != words:  # wide characters take two cells
                words = words[1:]
            row += f' · "…{words}"'
        return cut_to_width(row, width)

    def _waiting_row(self) -> str:
        seconds = time.monotonic() - self._started
        if self._prefill is None:
            if self._queued is not None:
                return f"waiting for {counted(self._queued.n_ahead + 1, 'other request')}, {seconds:.0f}s"
            return f"waiting, {seconds:.0f}s"
        done, total, cached = self._prefill.n_done, self._prefill.n_prompt, self._prefill.n_cached
        filled = _BAR * done // max(1, total)
        row = f"reading {'━' * filled}{'╌' * (_BAR - filled)} {done:,}/{total:,} tokens"
        if done > cached:  # what was cached took no time and says nothing about the speed
            rate = (done - cached) / (time.monotonic() - self._prefill_since)
            row += f" · {rate:,.0f} t/s · {(total - done) / rate:.0f}s left"
        return row + (f" · {cached:,} cached" if cached else "")


def _join_parts(parts: list[str], width: int) -> list[str]:
    """Parts with dots between them, in as many lines as it takes."""
    lines = [parts[0]]
    for part in parts[1:]:
        if len(lines[-1]) + 3 + len(part) <= width:
            lines[-1] += f" · {part}"
        else:
            lines.append(part)
    return lines
