"""What a user sees and reaches: sizes, themes, the keyboard, names for screen readers."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from tests.server.browser import ENTER, ESCAPE, Page
from tests.server.conftest import Server
from tests.server.page.conftest import Tell

pytestmark = pytest.mark.slow

TAB = "\ue004"
EVERYTHING = r"""# Heading

Text with [a link](https://example.org), `code`, ~~struck~~ and \(\frac{a}{b}\).

> quoted

| a | b |
|---|---|
| 1 | 2 |

```python
# comment
@cache
def f(x: int = 1) -> str:
    return "text" + str(None)
```
```diff
-gone
+come
```
"""
HERE = "return [document.activeElement.tagName, document.activeElement.ariaLabel ?? document.activeElement.textContent]"


def test_the_page_follows_the_answer_only_from_the_bottom(tell: Tell, page: Page) -> None:
    go_on, end = threading.Event(), threading.Event()
    tell("</think>", "line\n\n" * 60, go_on, "line\n\n" * 60, end)
    below = "const m = document.querySelector('main'); return m.scrollHeight - m.scrollTop - m.clientHeight"
    page.send("Go")
    page.until("document.querySelectorAll('.text p').length === 60")
    page.until(f"(() => {{ {below} }})() < 2")
    page.run("document.querySelector('main').scrollTop = 100")
    time.sleep(0.1)
    go_on.set()
    page.until("document.querySelectorAll('.text p').length === 120")
    assert page.run("return document.querySelector('main').scrollTop") == 100
    end.set()
    page.answer()
    assert page.run("return document.querySelector('main').scrollTop") == 100


@pytest.mark.parametrize("width", [360, 768, 1400])
def test_nothing_is_wider_than_the_window(tell: Tell, script: Tell, page: Page, width: int) -> None:
    end, long = threading.Event(), "y" * 300 + "\n\n```\n" + "z" * 300 + "\n```\n|a|b|\n|-|-|\n|" + "w " * 200 + "|b|"
    tell("x" * 300, "</think>", long + "\n\n$$" + "a + " * 100 + "b$$\n\n$" + "a + " * 100 + "b$")
    page.show_width(width)

    def fits() -> bool:
        page.until(f"document.documentElement.scrollWidth === {width}")
        inner = page.run("const m = document.querySelector('main'); return m.scrollWidth - m.clientWidth")
        return bool(inner == 0)

    page.ask("q" * 300)
    page.click("summary")
    assert fits()
    scrolled = "const p = document.querySelector(arguments[0]); p.scrollLeft = 1e6; return p.scrollLeft"
    assert page.run(scrolled, "pre") > 100
    script("x " * 300, end)
    page.click(".again")
    page.until("document.querySelector('.answer-now')?.checkVisibility()")
    assert page.count(".versions") == 1
    beside = page.run("""
      const [label, button] = ["summary b", ".answer-now"].map((selector) => document.querySelector(selector));
      label.textContent = "Thinking 12.3 s, 1,234 tokens, 1,234.5 tokens/s";
      return button.getBoundingClientRect().left - label.getBoundingClientRect().right;
    """)
    assert beside >= 0
    assert fits()
    end.set()
    page.answer()
    page.click("#settings-button")
    assert page.run("const d = document.querySelector('dialog'); return d.scrollWidth - d.clientWidth") == 0


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_all_text_has_the_contrast_that_wcag_asks_for(
    tell: Tell, script: Tell, page: Page, theme: str, server: Server
) -> None:
    """4.5 : 1 is level AA for text of any size (WCAG 2.2, 1.4.3); a button that does nothing is left out there."""
    tell("Hm.", "</think>", EVERYTHING)
    page.show_theme(theme)
    page.ask("Show me")
    page.type("show", "#search")
    page.run(
        "document.getElementById('key').hidden = false; document.getElementById('key-problem').textContent = 'No.'"
    )
    found = page.contrasts()
    assert len(found) > 40
    assert [words for ratio, words in found if ratio < 4.5 and not words.startswith("BUTTON Send")] == []
    page.ask_driver("POST", "url", url=f"{server.url}/docs")
    page.until("document.querySelector('.route')")
    found = page.contrasts()
    assert len(found) > 300
    assert [words for ratio, words in found if ratio < 4.5] == []


CONTROLS = {"button", "link", "textbox", "searchbox", "combobox", "spinbutton", "dialog", "DisclosureTriangle"}


def test_every_control_has_a_name(tell: Tell, page: Page) -> None:
    """In the tree that the browser gives to screen readers."""

    def nameless() -> list[Any]:
        nodes = page.devtools("Accessibility.getFullAXTree")["nodes"]
        shown = [node for node in nodes if not node["ignored"] and node["role"]["value"] in CONTROLS]
        assert len(shown) > 10
        return [node["role"] for node in shown if not node.get("name", {}).get("value", "").strip()]

    tell("Hm.", "</think>", EVERYTHING)
    page.ask("Show me")
    page.click(".again")
    page.answer()
    assert nameless() == []
    page.click("#settings-button")
    assert nameless() == []


def test_everything_can_be_done_with_the_keyboard(tell: Tell, page: Page) -> None:
    tell("Hm.", "</think>", "An answer.")
    page.ask("First?")

    def tab_to(name: str, most: int = 12) -> None:
        for _ in range(most):
            if page.run(HERE)[1] == name:
                return
            page.ask_driver("POST", "actions", actions=[key_presses(TAB)])
        raise AssertionError(f"no {name}: {page.run(HERE)}")

    page.run("document.activeElement.blur()")
    for name in (
        "New chat",
        "Search the chats",
        "First?",
        "Delete First?",
        "Export as JSON",
        "API",
        "Settings",
        "Edit",
    ):
        tab_to(name)
    page.ask_driver("POST", "actions", actions=[key_presses(ENTER)])
    assert page.run(HERE) == ["TEXTAREA", "Edit the question"]
    page.ask_driver("POST", "actions", actions=[key_presses(ESCAPE)])
    assert page.run(HERE)[1] == "Edit"
    for name in ("Copy", "Regenerate", "Question"):
        tab_to(name)


def key_presses(*keys: str) -> dict[str, Any]:
    strokes = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
    return {"type": "key", "id": "keyboard", "actions": strokes}


def test_the_chats_open_and_close_on_a_narrow_window(tell: Tell, page: Page) -> None:
    tell("</think>", "An answer.")
    page.show_width(360)
    page.ask("First?")
    aside = "document.querySelector('aside').checkVisibility({ visibilityProperty: true })"
    page.until(f"!{aside}")
    page.click("#menu")
    page.until(aside)
    assert page.run("return [document.activeElement.id, document.getElementById('menu').ariaExpanded]") == [
        "search",
        "true",
    ]
    page.type(ESCAPE, "#search")
    page.until(f"!{aside}")
    assert page.run(HERE) == ["BUTTON", "Chats"]
    page.click("#menu")
    page.until("document.querySelector('aside').getBoundingClientRect().left === 0")
    page.click("aside > a")
    page.until(f"!{aside}")
    assert page.count(".message") == 0
