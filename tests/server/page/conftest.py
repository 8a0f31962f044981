"""A browser before the real server, whose engine is the embedded model or says what a script says.

Where Chromium and its driver are not installed these tests are skipped: `apt-get install chromium chromium-driver`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from stepgguf.chat.exchange import ChatModel
from stepgguf.errors import StepggufError
from stepgguf.runtime.engine import Finished, Request, Sink, Step, Timings, Tokens
from stepgguf.runtime.llama import LlamaEngine
from stepgguf.server.config import ServerConfig
from tests.server.browser import CHROMEDRIVER, CHROMIUM, Page, browser
from tests.server.conftest import Server, running

Part = str | threading.Event | StepggufError
Tell = Callable[..., None]


class Pause(threading.Event):
    """About as long as a frame of the browser."""

    def wait(self, timeout: float | None = None) -> bool:
        time.sleep(0.012)
        return True


class UntilAsked(threading.Event):
    """In a script: the reasoning goes on until it is asked to end."""


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("chromium")


@pytest.fixture(scope="session")
def session(folder: Path) -> Iterator[httpx.Client]:
    if not (CHROMIUM and CHROMEDRIVER):
        pytest.skip("no browser: apt-get install chromium chromium-driver")
    with browser(folder) as client:
        yield client


@pytest.fixture
def page(session: httpx.Client, folder: Path) -> Iterator[Page]:
    page = Page(session, folder)
    yield page
    page.ask_driver("POST", "url", url="about:blank")
    page.devtools("Emulation.clearDeviceMetricsOverride")
    page.devtools("Emulation.setEmulatedMedia", features=[])
    assert page.problems() == []


class Scripted:
    """The real engine, but what it says is by script, so that a test sees a certain moment or text. An Event in the
    script is waited for."""

    def __init__(self, engine: LlamaEngine) -> None:
        self._engine = engine
        self.script: Sequence[Part] = ()
        self.requests: list[Request] = []
        self.tickets: list[Telling] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def submit(self, request: Request, sink: Sink) -> Telling:
        self.requests.append(request)
        self.tickets.append(Telling(self._engine, self.script, sink))
        return self.tickets[-1]


class Telling(threading.Thread):
    """One answer by script; it is its own ticket."""

    def __init__(self, engine: LlamaEngine, script: Sequence[Part], sink: Sink) -> None:
        super().__init__(daemon=True)
        self._engine, self._script, self._sink = engine, script, sink
        self.cancelled = threading.Event()
        self.start()

    def cancel(self) -> None:
        self.cancelled.set()

    def end_reasoning(self) -> None:
        for part in self._script:
            if isinstance(part, UntilAsked):
                part.set()

    def run(self) -> None:
        timings = Timings(n_prompt=10)
        for part in self._script:
            while isinstance(part, threading.Event) and not self.cancelled.is_set() and not part.wait(0.01):
                pass
            if self.cancelled.is_set():
                return self._sink(Finished("cancelled", timings))
            if isinstance(part, StepggufError):
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
    with running(ChatModel(scripted_engine), ServerConfig(model_ids=("demo",))) as server:
        yield server


@pytest.fixture
def script(scripted_engine: Scripted) -> Tell:
    """What the server will say to the next questions."""

    def told(*parts: Part) -> None:
        scripted_engine.script = parts
        scripted_engine.requests.clear()
        scripted_engine.tickets.clear()

    return told


@pytest.fixture
def tell(scripted: Server, script: Tell, page: Page) -> Tell:
    """Opens the page of a server that will say this."""

    def opened(*parts: Part) -> None:
        script(*parts)
        page.open(scripted.url)

    return opened


def asked(page: Page, question: str, **settings: str) -> str:
    """An answer with these settings, which are typed in."""
    page.click("#settings-button")
    for name, value in settings.items():
        page.type(value, f"[name={name}]")
    page.click("#settings form button")
    return page.ask(question)
