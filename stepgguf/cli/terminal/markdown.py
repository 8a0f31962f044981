"""An answer's Markdown, block by block: a block is rendered when the next one begins, and never again.

Blocks are those of the parser that renders them, so a list, a table or a fence is one however long it is.

Nothing that a model wrote is lost. HTML, entities, backslashes, formulas and the like stand there as they were written
(markdown_parser.py), and a block that still cannot be shown whole, like a table with more cells than columns or a list
that is indented beyond the screen, is shown as its source.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar, TextIO

from markdown_it.token import Token
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markdown import CodeBlock, Heading, Markdown, MarkdownElement, Paragraph, TableElement
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text
from rich.theme import Theme

from stepgguf.cli.terminal.markdown_parser import answer_parser

_THEME = "ansi_dark"  # the terminal's own colors, right on dark and light
_STYLES = Theme({"markdown.code": "cyan", "markdown.block_quote": "dim", "markdown.table.border": "dim"})
_STYLE = re.compile(r"\x1b\[[0-9;]*m")
_PADDING = re.compile(r" +((?:\x1b\[[0-9;]*m)*)$", re.MULTILINE)
_FENCES = ("fence", "code_block")
_MARKERS = frozenset("*_`~#>-+=|:.()[]")  # what may be shown as style, or as another character


class MarkdownBlocks:
    """Cuts an answer into blocks while it comes. `rest` is the block under way."""

    def __init__(self) -> None:
        self.rest = ""
        self._parser = answer_parser()

    def feed(self, text: str) -> list[str]:
        """Add text, and return the blocks that became complete."""
        self.rest += text
        if "\n" not in text:
            return []
        whole = self.rest[: self.rest.rindex("\n") + 1]  # the start of a line may not be what it will turn out to be
        starts = sorted({t.map[0] for t in self._parser.parse(whole) if t.level == 0 and t.map})
        if len(starts) < 2:
            return []
        lines = self.rest.split("\n")
        self.rest = "\n".join(lines[starts[-1] :])
        return ["\n".join(lines[a:b]).strip("\n") for a, b in pairwise(starts)]

    def finish(self) -> list[str]:
        """Return the last blocks: the text is over."""
        blocks = self.feed("\n")
        rest, self.rest = self.rest.strip("\n"), ""
        return [*blocks, rest] if rest.strip() else blocks


class MarkdownRenderer:
    """Renders blocks as text with escapes, for a terminal of any width."""

    def __init__(self, file: TextIO, *, color: bool) -> None:
        self._console = Console(file=file, force_terminal=True, no_color=not color, highlight=False, theme=_STYLES)
        self._parser = answer_parser()

    def render(self, block: str, width: int) -> str:
        """Return a block in lines of at most `width` cells, code aside, without empty lines around it."""
        tokens = self._parser.parse(block)
        rendered = self._render_tokens(tokens, width)
        if _is_incomplete(block, tokens, _STYLE.sub("", rendered)):
            with self._console.capture() as capture:
                self._console.print(Text(block, overflow="fold"), width=width)
            rendered = capture.get()
        lines = _PADDING.sub(r"\1", rendered).split("\n")
        seen = [i for i, line in enumerate(lines) if _STYLE.sub("", line)]  # rich puts empty lines around tables
        return "\n".join(lines[seen[0] : seen[-1] + 1]) + "\n" if seen else ""

    def _render_tokens(self, tokens: Sequence[Token], width: int) -> str:
        with self._console.capture() as capture:
            if len(tokens) == 1 and tokens[0].type in _FENCES:
                for text in _highlight_code(tokens[0]):
                    self._console.print(text, soft_wrap=True)  # not wrapped, so that it can be copied
            else:
                self._console.print(_Markdown(tokens), width=width)
        return capture.get()


def _is_incomplete(source: str, tokens: Sequence[Token], shown: str) -> bool:
    """Whether characters are missing, markers of Markdown and numbers of lists aside."""
    numbers = Counter("".join(token.info for token in tokens if token.type == "list_item_open"))
    wanted = Counter(char for char in source if not char.isspace() and char not in _MARKERS)
    return bool(wanted - numbers - Counter(shown))


def _highlight_code(token: Token) -> list[Text]:
    """Highlighted code between dim fences."""
    code, language = token.content, token.info.strip()
    fence = token.markup or "```"
    text = Syntax(code, language.split(" ")[0] or "text", theme=_THEME).highlight(code.rstrip("\n"))
    text.rstrip()
    return [Text(fence + language, style="dim"), text, Text(fence, style="dim")]


class _LeftHeading(Heading):
    """rich centers headings and puts a box around the first kind; in a conversation a bold line is enough."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        self.text.justify = "left"
        self.text.stylize("bold" if self.tag != "h1" else "bold underline")
        yield self.text


class _FencedCode(CodeBlock):
    """Inside lists and quotes code looks as outside, but is wrapped."""

    def __init__(self, token: Token) -> None:
        super().__init__(token.info, _THEME)
        self._token = token

    @classmethod
    def create(cls, markdown: Markdown, token: Token) -> _FencedCode:
        return cls(token)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from _highlight_code(self._token)


class _WholeTable(TableElement):
    """A word that is wider than its column is broken, where rich cuts it."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for table in super().__rich_console__(console, options):
            assert isinstance(table, Table)
            for column in table.columns:
                column.overflow = "fold"
            yield table


class _Markdown(Markdown):
    """Tokens of `answer_parser`. Line breaks are kept: people and models mean them."""

    elements: ClassVar[dict[str, type[MarkdownElement]]] = {
        **Markdown.elements,
        "heading_open": _LeftHeading,
        "fence": _FencedCode,
        "code_block": _FencedCode,
        "table_open": _WholeTable,
        "html_block": Paragraph,
        "formula": Paragraph,
    }

    def __init__(self, tokens: Sequence[Token]) -> None:
        super().__init__("", hyperlinks=False)
        self.parsed = list(tokens)
        for token in self.parsed:
            if token.type == "html_block":
                token.content = token.content.rstrip("\n")
            for child in token.children or ():
                if child.type == "softbreak":
                    child.type = "hardbreak"
