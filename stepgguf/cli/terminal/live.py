"""Rows at the bottom of the screen that are rewritten in place; what is committed goes above them and stays.

    committed text
    row 0            shown again and again; only what changed since is written, in one write
    row 1 █          the cursor rests at the end

A write is framed as a synchronized update (mode 2026), which terminals that know it draw at once. The others see one
small write. When the window gets narrower, terminals break old rows in two; the height is counted with that.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import TextIO

from rich.cells import cell_len, chop_cells

_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_BEGIN, _END = "\x1b[?2026h", "\x1b[?2026l"


class LiveRows:
    """Rows at the bottom of a terminal, `file`. color: styles are written; not under NO_COLOR."""

    def __init__(self, file: TextIO, *, color: bool) -> None:
        self._file, self._color = file, color
        self._rows: list[str] = []

    @property
    def width(self) -> int:
        """Cells that a row may have. The last column stays free: a cursor there behaves in many ways."""
        return max(2, self._terminal_size().columns - 1)

    @property
    def height(self) -> int:
        """Lines of the screen."""
        return max(2, self._terminal_size().lines)

    def style(self, codes: str, text: str) -> str:
        """Return text in an SGR style, e.g. "2;3" for dim italics; as it is without color."""
        return f"\x1b[{codes}m{text}\x1b[0m" if text and self._color else text

    def show_rows(self, rows: Sequence[str]) -> None:
        """Put these in place of the rows that are shown; of more than the screen holds, the last."""
        new = list(rows[-(self.height - 1) :])  # a row above the screen could not be cleared any more
        same = 0
        while same < min(len(new), len(self._rows)) and new[same] == self._rows[same]:
            same += 1
        if same < max(len(new), len(self._rows)):
            self._write(self._back_to(same) + "\n".join(new[same:]))
            self._rows = new

    def commit(self, text: str, rows: Sequence[str] = ()) -> None:
        """Write text that stays, ending its last line; then the rows."""
        new = list(rows[-(self.height - 1) :])
        self._write(self._back_to(0) + text + ("" if text.endswith("\n") or not text else "\n") + "\n".join(new))
        self._rows = new

    def write(self, text: str) -> None:
        """Write text that stays, and leave its last line open. There are no rows until it is ended."""
        self._write(self._back_to(0) + text)
        self._rows = []

    def clear(self) -> None:
        """Take the rows away."""
        self.show_rows([])

    def _back_to(self, i: int) -> str:
        """Escapes that clear the rows from i on and leave the cursor where row i starts. Line by line: to clear the
        rest of the screen at once makes tmux keep a copy of it when the cursor is in its corner."""
        if i >= len(self._rows):
            return "\n" if self._rows else ""
        n = sum(self._n_lines(row) for row in self._rows[i:])
        return "\r\x1b[2K" + "\x1b[A\x1b[2K" * (n - 1)

    def _n_lines(self, row: str) -> int:
        """Lines of the screen that a row takes, which may have become narrower since."""
        # rounded up: every row was narrower than the screen when it was written
        return max(1, -(-cell_len(_ESCAPE.sub("", row)) // self._terminal_size().columns))

    def _terminal_size(self) -> os.terminal_size:
        try:
            size = os.get_terminal_size(self._file.fileno())
        except OSError:
            return os.terminal_size((80, 24))
        # some pseudo-terminals say 0
        return size if size.columns and size.lines else os.terminal_size((80, 24))

    def _write(self, text: str) -> None:
        self._file.write(_BEGIN + text + _END)
        self._file.flush()


def strip_controls(text: str) -> str:
    """Return text of a model or a file without the characters that drive a terminal."""
    return _CONTROL.sub("�", text.replace("\t", "    "))


def cut_to_width(text: str, width: int) -> str:
    """Return a row's text, cut with … if it is too wide."""
    return text if cell_len(text) <= width else chop_cells(text, max(1, width - 1))[0] + "…"


def wrap_line(text: str, width: int) -> list[str]:
    """Return a line as rows of at most `width` cells, broken at spaces where there are any."""
    rows = []
    while cell_len(text) > width:
        head = chop_cells(text, width)[0]
        at = head.rfind(" ") if not text[len(head) :].startswith(" ") else len(head)
        at = at if at > 0 else len(head)
        rows.append(text[:at].rstrip(" "))
        text = text[at:].removeprefix(" ")
    return [*rows, text]
