"""Whatever a model writes, the terminal shows all of it. markdown-it's own tokens tell what must be there."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token

from stepgguf.cli.terminal.markdown import MarkdownBlocks, MarkdownRenderer

pytestmark = pytest.mark.slow

ORACLE = MarkdownIt("commonmark").enable(["table", "strikethrough"]).disable("text_join")
MARKERS = "*_`~#>-+=|:[]().0123456789"  # characters that Markdown has a meaning for; those that are text come as tokens
PIECES = [
    "word", "Press <Enter>", "std::vector<int>", "<div>\n", "</div>\n", "<br/>", "<!-- note -->", "&amp;", "&nbsp;",
    "\\(a_1 * b_2\\)", "\\[\na\n- b\n\\]\n", "\\(", "\\)", "\\[", "\\]", "$$", "\\*", "\\\\", "\\", "\\\n", "*", "**",
    "_", "__", "`", "``", "```\n", "```c++ title=x\n", "~~~\n", "~~", "# ", "## ", "- ", "+ ", "1. ", "7) ", "> ",
    "| a | b |\n|---|:-:|\n", "| 1 | 2 | 3 |\n", "|", "\n", "\n\n", "    ", "  ", "[", "](", ")", "![", "[x]: y 'z'\n",
    "[t](u_v_w \"title\")", "<http://a.b/*c*>", "---\n", "===\n", "é", "漢字", "😀", "5 < 6 > 4", "x = y", "2024. ",
]  # fmt: skip
texts = st.lists(st.sampled_from(PIECES) | st.text(max_size=8), max_size=25).map("".join)


def shown(text: str, width: int = 80, size: int = 1000) -> str:
    """What stands on the screen after the whole text came in pieces of `size`, without styles and white space."""
    blocks, renderer, found = MarkdownBlocks(), MarkdownRenderer(io.StringIO(), color=True), []
    for i in range(0, len(text), size):
        found += blocks.feed(text[i : i + size])
    rendered = "".join(renderer.render(block, width) for block in found + blocks.finish())
    return "".join(re.sub(r"\x1b\[[0-9;]*m", "", rendered).split())


def contents(tokens: Iterable[Token]) -> Iterator[str]:
    """Everything in markdown-it's tokens that is text: of escapes and entities the source."""
    for token in tokens:
        if token.children:
            yield from contents(token.children)
        elif token.type in ("text", "code_inline", "fence", "code_block", "html_inline", "html_block", "text_special"):
            yield token.markup if token.type == "text_special" else token.content


def is_subsequence(short: str, long: str) -> bool:
    rest = iter(long)
    return all(char in rest for char in short)


@example("word```\n```\n```\n**", 80, 1)  # the last block begins in the last line
@settings(max_examples=400, deadline=None)
@given(texts, st.integers(4, 100), st.integers(1, 50))
def test_every_visible_character_of_an_answer_is_shown(text: str, width: int, size: int) -> None:
    text = "".join(c for c in text if c == "\n" or (c.isprintable() and not "\ud800" <= c <= "\udfff"))
    on_screen, tokens = shown(text, width, size), ORACLE.parse(text)
    visible = Counter(char for char in text if not char.isspace() and char not in MARKERS)
    assert not visible - Counter(on_screen)
    if "\\[" in text or "$$" in text:
        return  # what markdown-it takes for a list in a formula is none here, and what follows may be something else
    inside = "".join("".join(contents(tokens)).split())
    assert not Counter(inside) - Counter(on_screen)
    if not any(token.type == "table_open" for token in tokens):
        assert is_subsequence(inside, on_screen), "and in its order"


@pytest.mark.parametrize(
    "text",
    [
        "Press <Enter>",
        "std::vector<int> a; std::map<K, V> b;",
        "<div>\n  <p>text</p>\n</div>",
        r"\(a_1 * b_2 * c_3\) and \[x^2\] and \{y\}",
        "$$\na\n- b\n= c\n$$",
        "\\[\n\\begin{aligned}\na &= b \\\\\n- c\n\\end{aligned}\n\\]",
        "&lt;b&gt; &copy;",
        '[x]: https://a.org "a title"',
        "| a |\n|---|\n| 1 | 2 | 3 |",
        r"a \| b",
        "2*3*4 = 24, a*b*c and un*believ*able",
    ],
)
def test_what_is_no_style_is_shown_as_it_was_written(text: str) -> None:
    assert shown(text) == "".join(text.split())


def test_links_and_images_keep_their_addresses() -> None:
    assert shown("[the *site*](https://a.org/_b_/*c* 'T') ![pic](p_1_.png)") == (
        "thesite(https://a.org/_b_/*c*'T')!pic(p_1_.png)"
    )


def test_style_is_still_style() -> None:
    assert shown("**bold** *em* `code` ~~old~~\n\n# Title\n\n- a\n\n> q\n\n1. x") == "boldemcodeoldTitle•a▌q1x"
    assert shown("日*本*語 f(*x*) 2**3**4") == "日本語f(x)234"


def test_code_in_a_list_says_its_language() -> None:
    assert shown("- a\n  ```python\n  x = 1\n  ```") == "•a```pythonx=1```"


def test_what_is_nested_beyond_the_screen_is_shown_as_it_is_written() -> None:
    deep = "> " * 30 + "deep"
    assert shown(deep, 40) == "".join(deep.split())
    list_ = "\n".join("  " * i + f"- word{i}" for i in range(15))
    assert shown(list_, 20) == "".join(list_.split())
