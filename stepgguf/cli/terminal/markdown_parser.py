r"""CommonMark with tables and ~~strikethrough~~, read so that what is no style stays in the text, as it was written.

<Enter>  std::vector<int>  <https://x.org>  &lt;  \(a_1\)  \*      text, and nothing inside is style
\[ ... \]  $$ ... $$                                              the same over several lines
[text](url "title")                                               a link, whose href is everything in parentheses
![text](url)                                                      the same behind an exclamation mark
[name]: url                                                       text: a definition that is used nowhere would vanish
2*3*4                                                             text: a single star inside a word is a star
"""

from __future__ import annotations

import re
from collections.abc import Callable

from markdown_it import MarkdownIt
from markdown_it.rules_block import StateBlock
from markdown_it.rules_inline import StateInline, autolink, escape, html_inline, link

InlineRule = Callable[[StateInline, bool], bool]
_FORMULA = re.compile(r"\\\(.+?\\\)|\\\[.+?\\\]|\$\$.+?\$\$", re.DOTALL)
_WIDE = "\u2e80"  # from here on: CJK
_OPENING = ("\\[", "$$")


def answer_parser() -> MarkdownIt:
    """Return a parser for what models write."""
    markdown = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    markdown.disable(["reference", "entity", "image"])
    for name, rule in (("escape", _escape_rule), ("html_inline", html_inline), ("autolink", autolink)):
        markdown.inline.ruler.at(name, _as_text(rule))
    markdown.inline.ruler.at("link", _link_rule)
    markdown.inline.ruler.before("emphasis", "star", _star_rule)
    markdown.block.ruler.before("fence", "formula", _formula_rule, {"alt": ["paragraph", "blockquote", "list"]})
    return markdown


def _as_text(rule: InlineRule) -> InlineRule:
    """A rule that makes text of what the given one takes."""

    def verbatim(state: StateInline, silent: bool) -> bool:
        start = state.pos
        if not rule(state, True):
            return False
        if not silent:
            state.push("text", "", 0).content = state.src[start : state.pos]
        return True

    return verbatim


def _escape_rule(state: StateInline, silent: bool) -> bool:
    """A formula or what the backslash stands before."""
    if state.src.startswith(("\\", "$$"), state.pos) and (found := _FORMULA.match(state.src, state.pos, state.posMax)):
        state.pos = found.end()
        return True
    return escape(state, silent)


def _star_rule(state: StateInline, silent: bool) -> bool:
    """A star inside a word is text; not in Chinese and Japanese, which have no spaces, so that it may be a mark."""
    before, here, after = (state.src[i : i + 1] for i in (max(0, state.pos - 1), state.pos, state.pos + 1))
    if here != "*" or not (before.isalnum() and after.isalnum()) or max(before, after) >= _WIDE:
        return False
    if not silent:
        state.pending += "*"
    state.pos += 1
    return True


def _link_rule(state: StateInline, silent: bool) -> bool:
    start, n = state.pos, len(state.tokens)
    if not link(state, silent):
        return False
    if not silent:
        end = state.md.helpers.parseLinkLabel(state, start, True)
        opening = next(token for token in state.tokens[n:] if token.type == "link_open")
        opening.attrs["href"] = state.src[end + 2 : state.pos - 1]
    return True


def _formula_rule(state: StateBlock, start: int, end: int, silent: bool) -> bool:
    """A block of the lines from one that begins a formula to the one that ends it: no line of it is a list. What
    does not end yet may do so when more of the answer comes, unless an empty line comes first."""
    begin = state.bMarks[start] + state.tShift[start]
    if state.is_code_block(start) or not state.src.startswith(_OPENING, begin):
        return False
    for line in range(start, end):
        if state.isEmpty(line) or state.sCount[line] < state.blkIndent:
            return False
        text = state.getLines(start, line + 1, state.blkIndent, False).strip()
        if found := _FORMULA.match(text):
            if found.end() < len(text):
                return False
            break
    if not silent:
        state.line = line + 1
        token = state.push("formula", "", 0)
        token.content, token.map = text, [start, state.line]
    return True
