"""A browser before the real server, whose engine is the embedded model or says what a script says.

Where Chromium and its driver are not installed these tests are skipped: `apt-get install chromium chromium-driver`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from stepgguf.chat.exchange import ChatModel
from stepgguf.server.config import ServerConfig
from tests.scripted_engine import Part, ScriptedEngine
from tests.server.browser import CHROMEDRIVER, CHROMIUM, Page, browser
from tests.server.conftest import Server, running

Tell = Callable[..., None]


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


@pytest.fixture(scope="session")
def scripted_engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture(scope="session")
def scripted(scripted_engine: ScriptedEngine) -> Iterator[Server]:
    with running(ChatModel(scripted_engine), ServerConfig(model_ids=("demo",))) as server:
        yield server


@pytest.fixture
def script(scripted_engine: ScriptedEngine) -> Tell:
    """What the server will say to the next questions."""
    return scripted_engine.say


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
