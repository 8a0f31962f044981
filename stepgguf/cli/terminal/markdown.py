"""An answer's Markdown, block by block: a block is rendered when the next one begins, and never again.

Blocks are those of the parser that rich renders with, so a list, a table or a fence is one however long it is.
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import ClassVar, TextIO

from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markdown import Heading, Markdown, MarkdownElement
from rich.syntax import Syntax
from rich.text import Text
from rich.theme import Theme

_THEME = "ansi_dark"  # the terminal's own colors, right on dark and light
_STYLES = Theme({"markdown.code": "cyan", "markdown.block_quote": "dim", "markdown.table.border": "dim"})
_STYLE = re.compile(r"\x1b\[[0-9;]*m")
_PADDING = re.compile(r" +((?:\x1b\[[0-9;]*m)*)$", re.MULTILINE)
_FENCES = ("fence", "code_block")


class Blocks:
    """Feed text; get the blocks that became complete. `rest` is the block under way."""

    def __init__(self) -> None:
        self.rest = ""
        self._parser = MarkdownIt("commonmark").enable("table")

    def feed(self, text: str) -> list[str]:
        self.rest += text
        if "\n" not in text:
            return []
        whole = self.rest[: self.rest.rindex("\n") + 1]  # the start of a line may not be what it will turn out to be
        starts = sorted({t.map[0] for t in self._parser.parse(whole) if t.level == 0 and t.map})
        if len(starts) < 2:
            return []
        lines = self.rest.splitlines(keepends=True)
        self.rest = "".join(lines[starts[-1] :])
        return ["".join(lines[a:b]).strip("\n") for a, b in pairwise(starts)]

    def finish(self) -> list[str]:
        rest, self.rest = self.rest.strip("\n"), ""
        return [rest] if rest.strip() else []


class Renderer:
    """Blocks as text with escapes, for a terminal of any width."""

    def __init__(self, file: TextIO, *, color: bool) -> None:
        self._console = Console(file=file, force_terminal=True, no_color=not color, highlight=False, theme=_STYLES)
        self._parser = MarkdownIt("commonmark")

    def render(self, block: str, width: int) -> str:
        with self._console.capture() as capture:
            token = next(iter(self._parser.parse(block)), None)
            if token is not None and token.type in _FENCES:
                self._code(token.content, token.info.strip())
            else:
                self._console.print(_Markdown(block), width=width)
        lines = _PADDING.sub(r"\1", capture.get()).split("\n")
        seen = [i for i, line in enumerate(lines) if _STYLE.sub("", line)]  # rich puts empty lines around tables
        return "\n".join(lines[seen[0] : seen[-1] + 1]) + "\n" if seen else ""

    def _code(self, code: str, language: str) -> None:
        """Between dim fences and not wrapped, so that it can be copied."""
        fence = "~~~" if "```" in code else "```"
        self._console.print(Text(fence + language, style="dim"), soft_wrap=True)
        text = Syntax(code, language.split(" ")[0] or "text", theme=_THEME).highlight(code.rstrip("\n"))
        text.rstrip()
        self._console.print(text, soft_wrap=True)
        self._console.print(Text(fence, style="dim"), soft_wrap=True)


class _LeftHeading(Heading):
    """rich centers headings and puts a box around the first kind; in a conversation a bold line is enough."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        self.text.justify = "left"
        self.text.stylize("bold" if self.tag != "h1" else "bold underline")
        yield self.text


class _Markdown(Markdown):
    """Line breaks are kept: people and models mean them."""

    elements: ClassVar[dict[str, type[MarkdownElement]]] = {**Markdown.elements, "heading_open": _LeftHeading}

    def __init__(self, block: str) -> None:
        super().__init__(block, code_theme=_THEME, hyperlinks=False)
        for token in self.parsed:
            for child in token.children or ():
                if child.type == "softbreak":
                    child.type = "hardbreak"
