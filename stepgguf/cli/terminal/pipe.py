"""An answer where no terminal shows it: stdout into a file or a pipe, and the rest to stderr."""

from __future__ import annotations

from typing import TextIO

from stepgguf.chat.output import Delta
from stepgguf.cli.terminal import footer
from stepgguf.cli.terminal.view import ReasoningDisplay
from stepgguf.conversation.records import AnswerUsage
from stepgguf.conversation.session import Update


class PipeView:
    """An AnswerView without a terminal: the answer to one file; full reasoning, counts and remarks to the other."""

    def __init__(self, out: TextIO, err: TextIO, *, reasoning_display: ReasoningDisplay) -> None:
        self._reasoning_display = reasoning_display
        self._out, self._err = out, err
        self.start()

    def start(self, *, keys: bool = False, raw: bool = False) -> None:
        self._last: dict[str, str] = {}  # the last text of each kind that has come

    def take(self, update: Update | None, usage: AnswerUsage) -> None:
        if not isinstance(update, Delta) or (update.kind == "reasoning" and self._reasoning_display != "full"):
            return
        if update.kind == "text" and "text" not in self._last:
            self._end_lines()  # of the reasoning: both may go to one place
        file = self._out if update.kind == "text" else self._err
        file.write(update.text)
        file.flush()
        self._last[update.kind] = update.text

    @property
    def is_reasoning(self) -> bool:
        return bool(self._last) and "text" not in self._last

    def toggle_reasoning(self) -> None:
        """There is nothing to fold."""

    def finish(self, usage: AnswerUsage) -> None:
        self._end_lines()
        self._last = {}

    def _end_lines(self) -> None:
        for kind, text in self._last.items():
            file = self._out if kind == "text" else self._err
            file.write("" if text.endswith("\n") else "\n")
            file.flush()
            self._last[kind] = "\n"

    def show_footer(self, usage: AnswerUsage, max_tokens: int | None) -> None:
        self._err.write(" · ".join(footer.usage_parts(usage)) + "\n")
        self.remark(*footer.ending_remarks(usage, max_tokens))

    def remark(self, *texts: str) -> None:
        for text in texts:
            self._err.write(f"{text}\n")
