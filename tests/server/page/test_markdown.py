"""An answer's Markdown as the page shows it: safe, the same in pieces, and with every visible character."""

from __future__ import annotations

import re
import threading
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.scripted_engine import Part, Pause
from tests.server.browser import Page
from tests.server.conftest import Server
from tests.server.page.conftest import Tell

pytestmark = pytest.mark.slow

HTML = "return document.querySelector('.answer:last-child .text').innerHTML"
RENDER = """
  return import("/static/chat/markdown.js").then(({ blocks, rendered }) => arguments[0].map((text) => {
    const node = document.createElement("div");
    node.append(...blocks(text, arguments[1]).map(rendered));
    const html = node.innerHTML;
    node.querySelectorAll(".math[title]").forEach((formula) => formula.replaceWith(formula.title));
    return [node.textContent, html];
  }));
"""


def render(page: Page, text: str, *, is_open: bool = False) -> tuple[str, str]:
    """What is read of it, formulas by their source, and its elements."""
    ((shown, html),) = page.run(RENDER, [text], is_open)
    return shown, html


ATTACKS = [
    "<img src=x onerror=\"document.title='broken'\">",
    "<script>document.title='broken'</script>",
    "[click](javascript:document.title='broken')",
    '[click](https://example.org/"onmouseover="x)',
    "```<b>\n</code></pre><svg onload=x>\n```",
    "![image](https://example.org/x.png)",
    "$\\href{javascript:document.title='broken'}{x}$ $\\includegraphics{https://example.org/x.png}$",
    "```html\n<img src=x onerror=\"document.title='broken'\">\n```",
]


def test_nothing_that_is_written_becomes_a_page(tell: Tell, page: Page) -> None:
    tell(ATTACKS[0], "</think>", "\n\n".join(ATTACKS))
    answer = page.ask(ATTACKS[0])
    page.click("summary")
    page.until("document.querySelector('.thoughts p')")
    assert page.text(".thoughts") == ATTACKS[0]
    assert page.text(".question > p") == ATTACKS[0]
    for text in (*ATTACKS[:3], "</code></pre><svg onload=x>"):
        assert text in answer
    assert page.count("main :is(img, script, svg, b:not(summary b), [onerror], [onmouseover], [href^=java])") == 0
    links = page.run("return [...document.querySelectorAll('.text a')].map(a => new URL(a.href).protocol)")
    assert links == ["https:", "https:"]
    page.reload()
    page.until("document.title !== 'stepgguf'")
    assert page.run("return document.title") == f"{ATTACKS[0]} · stepgguf"


MARKDOWN = r"""# Title

A *slanted*, **bold**, ~~struck~~, `code <b>` and [linked](https://example.org/a_(b)) 2*3*4 snake_case_name
$5, $6 and \( a_1 * b_1 \).

| a | b |
|---|--:|
| 1 | `x|y` | beyond

3. three
   - inner
4. four

   ```python
   if True:
       pass
   ```
- [other](ftp://example.org)

> quoted

\[
E = mc^2
\]

```
unclosed"""


def test_markdown_is_rendered_alike_in_one_piece_and_in_many(tell: Tell, script: Tell, page: Page) -> None:
    tell("</think>", MARKDOWN)
    page.ask("Whole?")
    whole = page.run(HTML)
    pieces: list[Part] = []
    for character in MARKDOWN:
        pieces += [character, Pause(0.012)]
    script("</think>", *pieces)
    page.ask("In pieces?")
    assert page.run(HTML) == whole
    rel = 'target="_blank" rel="noopener noreferrer"'
    for part in (
        "<h2>Title</h2>",
        "<em>slanted</em>, <strong>bold</strong>, <s>struck</s>, <code>code &lt;b&gt;</code>",
        f'<a href="https://example.org/a_(b)" {rel}>linked</a> 2*3*4 snake_case_name\n$5, $6 and',
        '<span class="math" title="\\( a_1 * b_1 \\)"><math><mrow><msub>',
        '<td>1</td><td style="text-align: right;"><code>x|y</code></td><td>beyond</td>',
        '<ol start="3"><li><p>three</p><ul><li><p class="tight">inner</p></li></ul></li>',
        '<code><span class="hl-keyword">if</span> <span class="hl-literal">True</span>:\n    ',
        '<ul><li><p class="tight">[other](ftp://example.org)</p></li></ul>',
        "<blockquote><p>quoted</p></blockquote>",
        '<span class="math display" title="\\[\nE = mc^2\n\\]"><math',
        "<code>unclosed</code>",
    ):
        assert part in whole, part


def test_a_growing_block_keeps_its_nodes(tell: Tell, page: Page) -> None:
    """Else selections, scroll positions and open menus in it would be lost with every token."""
    go_on = threading.Event()
    tell("</think>", "Some *text*.\n\n```\none line", go_on, "\nanother")
    page.send("Go")
    page.until("document.querySelector('pre')")
    page.run("window.kept = [document.querySelector('.text em'), document.querySelector('pre code').firstChild]")
    go_on.set()
    assert page.answer().endswith("one line\nanother")
    assert page.run("return window.kept.every((node) => node.isConnected)")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Press <Enter> & std::vector<int>, &lt;b&gt;.", None),
        ("<div>\n\n  <p>A block</p>\n\n</div>", "<div><p>A block</p></div>"),
        (r"A regex \d+\(\w\), a path C:\Users\x and \\server\share.", None),
        ("[1]: https://example.org 'A title'", None),
        ("![alt](x.png) and <https://example.org>", None),
        ("A heading?\n---", "A heading?"),
        (r"\*not slanted\*, 1\. no list, \# no heading", "*not slanted*, 1. no list, # no heading"),
        ("An opened \\( a + b", None),
        ("$x", None),
        ("> " * 100 + "deep", "> " * 60 + "deep"),
        ("a **b", None),
        ('```rust title="a.rs"\nfn main() {}\n```', 'rust title="a.rs"Copyfn main() {}'),
    ],
)
def test_what_is_not_markdown_is_shown_as_it_is(server: Server, page: Page, text: str, shown: str | None) -> None:
    page.open(server.url)
    found, expected = render(page, text)[0], text if shown is None else shown
    assert found.split() == expected.split()


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("**注意：**请看", "<p><strong>注意：</strong>请看</p>"),
        ("这是**“强调”**的字", "<p>这是<strong>“强调”</strong>的字</p>"),
        ("这是*强调*的字", "<p>这是<em>强调</em>的字</p>"),
        ("un*frigging*believable", "<p>un*frigging*believable</p>"),
        ("snake_case and __init__.py", "<p>snake_case and <strong>init</strong>.py</p>"),
    ],
)
def test_marks_inside_words(server: Server, page: Page, text: str, html: str) -> None:
    """Chinese has no spaces around what is bold; 2*3*4 has no slanted 3."""
    page.open(server.url)
    assert render(page, text)[1] == html


def test_a_formula_is_drawn_and_one_that_is_none_is_shown_as_text(server: Server, page: Page) -> None:
    page.open(server.url)
    for text in (r"\(\frac{1}{2}\)", r"$\frac{1}{2}$", "$$\\frac{1}{2}$$", "\\[\n\\frac{1}{2}\n\\]"):
        assert "<mfrac>" in render(page, text)[1]
    assert "<math" not in render(page, "It costs $5 or $6.")[1]
    wrong = r"\(\nosuchcommand{x}\)"
    assert render(page, wrong)[1] == f'<p><span class="math source">{wrong}</span></p>'
    assert "<math" not in render(page, "$$\nx^2", is_open=True)[1]  # it is not finished
    assert render(page, "$$\nx^2", is_open=True)[0] == "$$\nx^2"


def test_marks_that_are_probably_to_come_are_closed_while_a_text_grows(server: Server, page: Page) -> None:
    page.open(server.url)
    assert render(page, "It is **very bo", is_open=True)[1] == "<p>It is <strong>very bo</strong></p>"
    assert render(page, "Call `fn(*", is_open=True)[1] == "<p>Call <code>fn(*</code></p>"
    assert render(page, "It is **very bo")[1] == "<p>It is **very bo</p>"


WORDS = [f"w{i}x" for i in range(12)]
PIECES = """< </div> <b> & &amp; ( ) [ ] ![ ](u) " = / \\ \\( \\) \\[ \\] { } ** * __ _ ` ``` ~~ ~~~ # > - + | |-|-|
1. 7) [a]: 2*3 $ $$ \t 中文 ： é""".split()
PIECE = st.sampled_from([*WORDS, *PIECES, " ", "\n", "\n\n", "    "])
ALWAYS_SHOWN = set('<&()[]"=/;:{}!')


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.lists(PIECE, max_size=40).map("".join), min_size=8, max_size=8), is_open=st.booleans())
def test_every_visible_character_is_shown(here: Page, texts: list[str], is_open: bool) -> None:
    """Words, brackets of all kinds and quotation marks, always; a backslash unless a Markdown mark follows it or it
    begins or ends a formula. (A list's numbers are its style's.)"""
    for text, (shown, _) in zip(texts, here.run(RENDER, texts, is_open), strict=True):
        source, found = Counter(text), Counter(shown)
        assert all(shown.count(word) >= text.count(word) for word in WORDS), text
        for character in ALWAYS_SHOWN:
            in_delimiters = len(re.findall(rf"\\{re.escape(character)}", text)) if character in "()[]" else 0
            in_numbers = text.count("7)") if character == ")" else 0
            assert found[character] >= source[character] - in_delimiters - in_numbers, (text, shown)
        marks = len(re.findall(r"\\[*_`~#|$!<>+.()\[\]-]", text))
        assert found["\\"] >= source["\\"] - marks, (text, shown)


@pytest.fixture
def here(server: Server, page: Page) -> Page:
    page.open(server.url)
    return page
