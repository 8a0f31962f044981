"""A browser driven through its chromedriver, which speaks WebDriver (JSON over HTTP): httpx is all that is needed."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")
FLAGS = """--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync --window-size=1200,800""".split()
ENTER, ESCAPE, SHIFT = "\ue007", "\ue00c", "\ue008"
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # WebDriver's key of a reference to an element
WAIT = 20.0
# Of every visible element with text of its own: its colour, and those behind it from the nearest that is opaque.
CONTRASTS = """
  const parse = (text) => { const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number); return [r, g, b, a]; };
  const linear = (v) => v / 255 <= .04045 ? v / 255 / 12.92 : ((v / 255 + .055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => .2126 * linear(r) + .7152 * linear(g) + .0722 * linear(b);
  const behind = (element) => {
    const colour = parse(getComputedStyle(element).backgroundColor);
    return colour[3] === 1 || !element.parentElement ? colour : behind(element.parentElement);
  };
  for (const details of document.querySelectorAll("details")) details.open = true;
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!own || !element.checkVisibility({ checkVisibilityCSS: true }) || element.closest("script, style")) continue;
    const colours = [parse(getComputedStyle(element).color), behind(element)];
    const [a, b] = colours.map(light).sort((x, y) => y - x);
    found.push([(a + .05) / (b + .05), `${element.tagName} ${element.textContent.trim().slice(0, 30)} ${colours}`]);
  }
  return found;
"""


class Page:
    """One tab. What is not visible cannot be clicked, and keys go where a user's would."""

    def __init__(self, session: httpx.Client, downloads: Path) -> None:
        self._session, self.downloads = session, downloads

    def ask_driver(self, method: str, path: str, **fields: Any) -> Any:
        response = self._session.request(method, path, json=fields if method == "POST" else None)
        assert response.is_success, response.text
        return response.json()["value"]

    def open(self, url: str) -> None:
        """A first visit: nothing is stored."""
        self.ask_driver("POST", "url", url=url)
        self.run("localStorage.clear(); sessionStorage.clear()")
        self.ask_driver("POST", "url", url="about:blank")
        self.ask_driver("POST", "url", url=url)
        self.until("document.getElementById('context').textContent || !document.getElementById('key').hidden")

    def reload(self) -> None:
        self.ask_driver("POST", "refresh")

    def run(self, script: str, *args: object) -> Any:
        return self.ask_driver("POST", "execute/sync", script=script, args=args)

    def until(self, condition: str) -> None:
        deadline = time.monotonic() + WAIT
        while not self.run(f"return Boolean({condition})"):
            assert time.monotonic() < deadline, f"never: {condition}\n{self.text('body')}"
            time.sleep(0.02)

    def find(self, selector: str) -> str:
        return f"element/{self.ask_driver('POST', 'element', using='css selector', value=selector)[ELEMENT]}"

    def text(self, selector: str) -> str:
        """What a user sees of it."""
        seen: str = self.ask_driver("GET", f"{self.find(selector)}/text")
        return seen

    def count(self, selector: str) -> int:
        n: int = self.run("return document.querySelectorAll(arguments[0]).length", selector)
        return n

    def click(self, selector: str) -> None:
        self.ask_driver("POST", f"{self.find(selector)}/click")

    def type(self, text: str, selector: str = "#composer textarea") -> None:
        self.ask_driver("POST", f"{self.find(selector)}/value", text=text)

    def send(self, question: str) -> None:
        self.type(question + ENTER)

    def ask(self, question: str) -> str:
        """Send a question, wait for the end of the answer, and read its text."""
        self.send(question)
        return self.answer()

    def answer(self) -> str:
        self.until("!document.querySelector('.running') && document.querySelector('.answer')")
        return self.text(".answer:last-child .text") if self.count(".answer:last-child .text > *") else ""

    def devtools(self, command: str, **params: object) -> Any:
        return self.ask_driver("POST", "goog/cdp/execute", cmd=command, params=params)

    def contrasts(self) -> list[tuple[float, str]]:
        """Of every visible element with text of its own: the ratio to what is behind it, and what it is."""
        return [(ratio, words) for ratio, words in self.run(CONTRASTS)]

    def show_theme(self, theme: str) -> None:
        self.devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])

    def show_width(self, width: int) -> None:
        """A phone's, if it is narrow."""
        sizes = {"width": width, "height": 640, "deviceScaleFactor": 1, "mobile": width < 500}
        self.devtools("Emulation.setDeviceMetricsOverride", **sizes)

    def problems(self) -> list[str]:
        """What the browser's console has against the page: exceptions, broken policies. Not statuses."""
        entries = self.ask_driver("POST", "se/log", type="browser")
        return [entry["message"] for entry in entries if entry["source"] != "network"]


@contextmanager
def browser(folder: Path) -> Iterator[httpx.Client]:
    """A browser, as the base URL of its driver's commands."""
    command = [str(CHROMEDRIVER), "--port=0", f"--log-path={folder / 'log'}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as driver:
        try:
            assert driver.stdout is not None
            started = next(line for line in driver.stdout if "successfully on port" in line)
            port = int(started.rstrip(".\n").rsplit(" ", 1)[1])
            options = {
                "binary": CHROMIUM,
                "args": [*FLAGS, f"--user-data-dir={folder / 'profile'}"],
                "prefs": {"download.default_directory": str(folder)},
            }
            wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
                made = client.post("/session", json={"capabilities": {"alwaysMatch": wanted}}).json()["value"]
                client.base_url = f"http://127.0.0.1:{port}/session/{made['sessionId']}"
                yield client
                client.delete(str(client.base_url).rstrip("/"))
        finally:
            driver.terminate()
