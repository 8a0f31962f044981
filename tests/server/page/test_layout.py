"""What a user sees and reaches: sizes, themes, the keyboard, names for screen readers."""

from __future__ import annotations

import threading
import time

import pytest

from tests.server.browser import Page
from tests.server.page.conftest import Tell


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
def test_nothing_is_wider_than_the_window(tell: Tell, page: Page, width: int) -> None:
    tell("x" * 300, "</think>", "y" * 300 + "\n\n```\n" + "z" * 300 + "\n```\n|a|b|\n|-|-|\n|" + "w " * 200 + "|b|")
    page.devtools(
        "Emulation.setDeviceMetricsOverride", width=width, height=640, deviceScaleFactor=1, mobile=width < 500
    )
    try:
        page.ask("q" * 300)
        page.click("summary")
        assert page.run("return document.documentElement.scrollWidth") == width
        assert page.run("const m = document.querySelector('main'); return m.scrollWidth - m.clientWidth") == 0
        scrolled = "const p = document.querySelector('pre'); p.scrollLeft = 1e6; return p.scrollLeft"
        assert page.run(scrolled) > 100
    finally:
        page.devtools("Emulation.clearDeviceMetricsOverride")
