"""The chat page in a real browser, before the real server.

Chromium is driven through its chromedriver, which speaks WebDriver (JSON over HTTP), so httpx is all that is needed.
Where they are not installed these tests are skipped: `apt-get install chromium chromium-driver`.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from stepgguf.chat.exchange import ChatModel
from stepgguf.errors import EngineDied
from stepgguf.runtime.engine import Finished, Request, Sink, Step, Ticket, Timings, Tokens
from stepgguf.runtime.llama import LlamaEngine
from stepgguf.server.config import ServerConfig
from tests.server.conftest import Server, running

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and CHROMEDRIVER), reason="no browser: apt-get install chromium chromium-driver"
)

FLAGS = """--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync --window-size=1200,800""".split()
LETTERS = "How many 'r's are in the word strawberry?"
ENTER, ESCAPE, SHIFT = "\ue007", "\ue00c", "\ue008"
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # WebDriver's key of a reference to an element
WAIT = 20.0


class Page:
    """One tab. What is not visible cannot be clicked, and keys go where a user's would."""

    def __init__(self, session: httpx.Client) -> None:
        self._session = session

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

    def problems(self) -> list[str]:
        """What the browser's console has against the page: exceptions, broken policies. Not the statuses of requests."""
        entries = self.ask_driver("POST", "se/log", type="browser")
        return [entry["message"] for entry in entries if entry["source"] != "network"]


@pytest.fixture(scope="session")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder = tmp_path_factory.mktemp("chromium")
    with open(folder / "driver.log", "w") as log, subprocess.Popen(
        [str(CHROMEDRIVER), "--port=0"], stdout=subprocess.PIPE, stderr=log, text=True
    ) as driver:
        try:
            assert driver.stdout is not None
            started = next(line for line in driver.stdout if "successfully on port" in line)
            port = int(started.rstrip(".\n").rsplit(" ", 1)[1])
            options = {"binary": CHROMIUM, "args": [*FLAGS, f"--user-data-dir={folder / 'profile'}"]}
            wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
                made = client.post("/session", json={"capabilities": {"alwaysMatch": wanted}}).json()["value"]
                client.base_url = f"http://127.0.0.1:{port}/session/{made['sessionId']}"
                yield client
                client.delete(str(client.base_url).rstrip("/"))
        finally:
            driver.terminate()


@pytest.fixture
def page(session: httpx.Client) -> Iterator[Page]:
    page = Page(session)
    yield page
    page.ask_driver("POST", "url", url="about:blank")
    assert page.problems() == []


@dataclass(frozen=True)
class Halt:
    """In a script: wait here until the test goes on."""

    go_on: threading.Event


class Scripted:
    """The real engine, but what it says is by script, so that a test can see a moment and any text."""

    def __init__(self, engine: LlamaEngine) -> None:
        self._engine = engine
        self.script: Sequence[str | Halt | EngineDied] = ()
        self.requests: list[Request] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def submit(self, request: Request, sink: Sink) -> Ticket:
        self.requests.append(request)
        return Telling(self._engine, self.script, sink)


class Telling(threading.Thread):
    def __init__(self, engine: LlamaEngine, script: Sequence[str | Halt | EngineDied], sink: Sink) -> None:
        super().__init__(daemon=True)
        self._engine, self._script, self._sink = engine, script, sink
        self._cancelled = threading.Event()
        self.start()

    def cancel(self) -> None:
        self._cancelled.set()

    def end_reasoning(self) -> None:
        raise NotImplementedError

    def run(self) -> None:
        timings = Timings(n_prompt=10)
        for part in self._script:
            if isinstance(part, Halt):
                while not (part.go_on.wait(0.01) or self._cancelled.is_set()):
                    pass
            if self._cancelled.is_set():
                return self._sink(Finished("cancelled", timings))
            if isinstance(part, EngineDied):
                return self._sink(Finished("error", timings, part))
            if isinstance(part, str):
                timings.n_generated += 1
                self._sink(Tokens((Step(self._engine.token_id(part) or 0, part.encode()),)))
        return self._sink(Finished("stop", timings))


@pytest.fixture(scope="session")
def scripted_engine(chat_model: ChatModel) -> Scripted:
    return Scripted(chat_model.engine)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def scripted(scripted_engine: Scripted) -> Iterator[Server]:
    with running(ChatModel(scripted_engine), ServerConfig(model_ids=("demo",))) as server:  # type: ignore[arg-type]
        yield server


Telling_ = Callable[..., None]


@pytest.fixture
def tell(scripted: Server, scripted_engine: Scripted, page: Page) -> Callable[..., None]:
    """Open the page before a server that will say this."""

    def opened(*script: str | Halt | EngineDied) -> None:
        scripted_engine.script = script
        scripted_engine.requests.clear()
        page.open(scripted.url)

    return opened


def test_an_answer_streams_in_and_its_thinking_is_folded(server: Server, page: Page) -> None:
    page.open(server.url)
    assert page.text("#model") == "demo"
    assert page.text("#context") == "4,096 tokens"
    page.click("#settings-button")
    page.type("0", "[name=temperature]")
    page.type(ESCAPE, "[name=temperature]")
    assert page.ask(LETTERS) == "There are 3 'r's."
    assert page.text(".question") .startswith(LETTERS)
    assert page.text("summary").startswith("Thought for 0.")
    assert page.text("summary").endswith("41 tokens")
    assert page.text(".thoughts") == ""
    page.click("summary")
    page.until("document.querySelector('.thoughts p')")
    assert page.text(".thoughts").startswith("Looking for r. Spelling it: s, t, r (1)")
