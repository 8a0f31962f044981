"""The chat page in a real browser, before the real server.

Where Chromium and its driver are not installed these tests are skipped: `apt-get install chromium chromium-driver`.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from stepgguf.chat.exchange import ChatModel
from stepgguf.errors import EngineDied, StepggufError
from stepgguf.runtime.engine import Finished, Request, Sink, Step, Timings, Tokens
from stepgguf.runtime.llama import LlamaEngine
from stepgguf.server import app
from stepgguf.server.config import ServerConfig
from tests.server.browser import CHROMEDRIVER, CHROMIUM, ENTER, ESCAPE, WAIT, Page, browser
from tests.server.conftest import Serve, Server, running

pytestmark = pytest.mark.skipif(
    not (CHROMIUM and CHROMEDRIVER), reason="no browser: apt-get install chromium chromium-driver"
)

LETTERS = "How many 'r's are in the word strawberry?"

PAGE = Path(app.__file__).parent / "static" / "index.html"
Script = Sequence["str | threading.Event | StepggufError"]


class Pause(threading.Event):
    """About as long as a frame of the browser."""

    def wait(self, timeout: float | None = None) -> bool:
        time.sleep(0.012)
        return True


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("chromium")


@pytest.fixture(scope="session")
def session(folder: Path) -> Iterator[httpx.Client]:
    with browser(folder) as client:
        yield client


@pytest.fixture
def page(session: httpx.Client, folder: Path) -> Iterator[Page]:
    page = Page(session, folder)
    yield page
    page.ask_driver("POST", "url", url="about:blank")
    assert page.problems() == []


class Scripted:
    """The real engine, but what it says is by script, so that a test sees a certain moment or text. An Event in the
    script is waited for."""

    def __init__(self, engine: LlamaEngine) -> None:
        self._engine = engine
        self.script: Script = ()
        self.requests: list[Request] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def submit(self, request: Request, sink: Sink) -> Telling:
        self.requests.append(request)
        return Telling(self._engine, self.script, sink)


class Telling(threading.Thread):
    """One answer by script; it is its own ticket."""

    def __init__(self, engine: LlamaEngine, script: Script, sink: Sink) -> None:
        super().__init__(daemon=True)
        self._engine, self._script, self._sink = engine, script, sink
        self._cancelled = threading.Event()
        self.start()

    def cancel(self) -> None:
        self._cancelled.set()

    def end_reasoning(self) -> None:
        raise AssertionError("the page does not ask for that")

    def run(self) -> None:
        timings = Timings(n_prompt=10)
        for part in self._script:
            while isinstance(part, threading.Event) and not self._cancelled.is_set() and not part.wait(0.01):
                pass
            if self._cancelled.is_set():
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
def tell(scripted: Server, scripted_engine: Scripted, page: Page) -> Callable[..., None]:
    """Opens the page of a server that will say this."""

    def opened(*script: str | threading.Event | StepggufError) -> None:
        scripted_engine.script = script
        scripted_engine.requests.clear()
        page.open(scripted.url)

    return opened


def downloaded(folder: Path) -> Path:
    deadline = time.monotonic() + WAIT
    while not (files := list(folder.glob("*.json"))):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return files[0]


def asked(page: Page, question: str, **settings: str) -> str:
    """An answer with these settings, which are typed in."""
    page.click("#settings-button")
    for name, value in settings.items():
        page.type(value, f"[name={name}]")
    page.click("#settings form button")
    return page.ask(question)


def test_an_answer_streams_in_and_its_thinking_is_folded(server: Server, page: Page) -> None:
    page.open(server.url)
    assert (page.text("#model"), page.text("#context"), page.text("#state")) == ("demo", "4,096", "ready")
    assert asked(page, LETTERS, temperature="0") == "There are 3 'r's."
    assert page.text(".question").startswith(LETTERS)
    assert re.fullmatch(r"Thought for \d+\.\d s, 41 tokens", page.text("summary"))
    assert page.text(".answer .text") == "There are 3 'r's."
    assert re.fullmatch(
        r"41 thinking \+ 9 answer tokens · [\d.,]+ tokens/s · first after \d+\.\d\d s · prompt 42, \d+ cached",
        page.text(".stats"),
    )
    page.until("document.getElementById('context').textContent === '92 of 4,096'")
    assert page.text(".thoughts") == ""
    page.click("summary")
    page.until("document.querySelector('.thoughts p')")
    assert page.text(".thoughts").startswith("Looking for r. Spelling it: s, t, r (1)")


def test_thinking_shows_how_it_goes_on(tell: Callable[..., None], page: Page) -> None:
    thinking, answering = threading.Event(), threading.Event()
    tell("Two ", "and two", thinking, " is four.", "</think>", "Four", answering, ".")
    page.send("2 + 2?")
    page.until("document.querySelector('.tail').textContent === 'Two and two'")
    first = page.text("summary b")
    assert re.fullmatch(r"Thinking \d\.\d s, about [12] tokens", first)
    page.until(f"document.querySelector('summary b').textContent !== {json.dumps(first)}")  # the clock goes on
    page.click("summary")
    page.until("document.querySelector('.thoughts').textContent === 'Two and two'")
    thinking.set()
    page.until("document.querySelector('.text').textContent === 'Four'")
    assert page.text("summary b").startswith("Thought for")
    assert page.text(".thoughts") == "Two and two is four."
    answering.set()
    assert page.answer() == "Four."


@pytest.mark.parametrize(
    "stop", [lambda page: page.click("#stop"), lambda page: page.type(ESCAPE)], ids=["button", "key"]
)
def test_stop_keeps_what_there_is_and_frees_the_slot(
    chat_model: ChatModel, page: Page, stop: Callable[[Page], None]
) -> None:
    class Endless(Scripted):
        def submit(self, request: Request, sink: Sink) -> Any:
            return chat_model.engine.submit(replace(request, ignore_end=True), sink)

    with running(ChatModel(Endless(chat_model.engine)), ServerConfig(model_ids=("demo",))) as server:  # type: ignore[arg-type]
        page.open(server.url)
        page.send(LETTERS)
        page.until("document.querySelector('.text').textContent.length > 40")
        assert server.engine.stats().n_running == 1
        stop(page)
        assert server.idle_within(1)
        assert page.answer().startswith("There ")
        assert page.text(".note") == "Stopped."
        page.reload()
        assert page.text(".note") == "Stopped."


def test_settings_are_sent_and_nothing_else_is(
    tell: Callable[..., None], page: Page, scripted_engine: Scripted
) -> None:
    tell("</think>", "Yes.")
    page.ask("Really?")
    (plain,) = scripted_engine.requests
    assert plain.sampling == scripted_engine.info.sampling
    assert plain.max_tokens is None
    assert plain.reasoning is not None
    assert plain.reasoning.budget is None
    sampling = {"temperature": "0.5", "top_p": "0.75", "top_k": "7", "min_p": "0.25", "seed": "11"}
    asked(page, "And now?", **sampling, max_tokens="99", thinking_budget_tokens="12", system="Be brief.")
    _, request = scripted_engine.requests
    assert request.sampling == replace(plain.sampling, temperature=0.5, top_p=0.75, top_k=7, min_p=0.25, seed=11)
    assert request.max_tokens == 99
    assert request.reasoning is not None
    assert request.reasoning.budget == 12
    prompt = b"".join(map(scripted_engine.piece, request.prompt)).decode()
    assert "Be brief." in prompt
    assert prompt.index("Really?") < prompt.index("Yes.") < prompt.index("And now?")
    assert page.text("#settings-button") == "Settings (8)"
    page.reload()
    page.click("#settings-button")
    page.click("#defaults")
    page.click("#settings form button")
    page.ask("And then?")
    assert scripted_engine.requests[-1].sampling == plain.sampling


def test_effort_none_does_not_think(server: Server, page: Page) -> None:
    page.open(server.url)
    assert asked(page, "Hello", reasoning_effort="none", max_tokens="8", temperature="0").startswith("Hello! How can")
    assert page.text("summary") == ""
    assert page.text(".note").startswith("Cut off at 8 tokens. Raise the limit")


ATTACKS = [
    "<img src=x onerror=\"document.title='broken'\">",
    "<script>document.title='broken'</script>",
    "[click](javascript:document.title='broken')",
    '[click](https://example.org/"onmouseover="x)',
    "```<b>\n</code></pre><svg onload=x>\n```",
]


def test_nothing_that_is_written_becomes_a_page(tell: Callable[..., None], page: Page) -> None:
    tell(ATTACKS[0], "</think>", "\n\n".join(ATTACKS))
    answer = page.ask(ATTACKS[0])
    page.click("summary")
    page.until("document.querySelector('.thoughts p')")
    assert page.text(".thoughts") == ATTACKS[0]
    assert page.text(".question > p") == ATTACKS[0]
    for text in ATTACKS[:3]:
        assert text in answer
    assert "</code></pre><svg onload=x>" in answer
    assert page.count("main :is(img, script, svg, b:not(summary b), [onerror], [onmouseover])") == 0
    assert page.run("return [...document.querySelectorAll('.text a')].map(a => new URL(a.href).protocol)") == ["https:"]
    page.reload()
    assert page.run("return document.title") == f"{ATTACKS[0]} · stepgguf"


MARKDOWN = """# Title

A *slanted*, **bold**, `code <b>` and [linked](https://example.org/a_(b)) 2*3*4 snake_case_name $5, $6 and $a_1 * b_1$.

| a | b |
|---|--:|
| 1 | `x\\|y` |

3. three
   - inner
4. four

   ```python
   if True:
       pass
   ```
- [other](ftp://example.org)

> quoted

```
unclosed"""


def test_markdown_is_rendered_alike_in_one_piece_and_in_many(tell: Callable[..., None], page: Page) -> None:
    html = "return document.querySelector('.text').innerHTML"
    tell("</think>", MARKDOWN)
    page.ask("Whole?")
    whole = page.run(html)
    pieces: list[str | threading.Event] = []
    for character in MARKDOWN:
        pieces += [character, Pause()]
    tell("</think>", *pieces)
    page.ask("In pieces?")
    assert page.run(html) == whole
    rel = 'target="_blank" rel="noopener noreferrer"'
    for part in (
        "<h2>Title</h2>",
        "<em>slanted</em>, <strong>bold</strong>, <code>code &lt;b&gt;</code>",
        f'<a href="https://example.org/a_(b)" {rel}>linked</a> 2*3*4 snake_case_name $5, $6 and',
        '<span class="math">$a_1 * b_1$</span>.',
        '<td>1</td><td style="text-align: right;"><code>x|y</code></td>',
        '<ol start="3"><li><p>three</p><ul><li><p>inner</p></li></ul></li><li><p>four</p><figure>',
        "<code>if True:\n    pass</code>",
        "<ul><li><p>[other](ftp://example.org)</p></li></ul>",
        "<blockquote><p>quoted</p></blockquote>",
        "<code>unclosed</code>",
    ):
        assert part in whole, part


def test_a_growing_block_keeps_its_nodes(tell: Callable[..., None], page: Page) -> None:
    """Else selections, scroll positions and open menus in it would be lost with every token."""
    go_on = threading.Event()
    tell("</think>", "Some *text*.\n\n```\none line", go_on, "\nanother")
    page.send("Go")
    page.until("document.querySelector('pre')")
    page.run("window.kept = [document.querySelector('.text em'), document.querySelector('pre code').firstChild]")
    go_on.set()
    assert page.answer().endswith("one line\nanother")
    assert page.run("return window.kept.every((node) => node.isConnected)")


def test_a_refusal_is_shown_with_its_request(server: Server, page: Page) -> None:
    page.open(server.url)
    page.run("document.querySelector('#composer textarea').value = 'word '.repeat(5000)")
    page.ask(" ")
    assert re.search(r"has \d{4,5} tokens, the context 4096[\s\S]*\nRequest [0-9a-f]{24}$", page.text(".note.wrong"))
    asked(page, "Hello", temperature="3")
    assert "less than or equal to 2" in page.text(".answer:last-child .note")


def test_an_error_within_a_stream_is_shown_below_what_came(tell: Callable[..., None], page: Page) -> None:
    go_on = threading.Event()
    tell("</think>", "It is", go_on, EngineDied("the engine died", hint="Try again.", recovered=True))
    page.send("What?")
    page.until("document.querySelector('.text').textContent === 'It is'")
    go_on.set()
    assert page.answer() == "It is"
    assert re.fullmatch(r"the engine died\. Try again\.\nRequest [0-9a-f]{24}", page.text(".note.wrong"))


def test_a_server_that_has_gone_is_noticed(serve: Serve, page: Page) -> None:
    with serve() as server:
        page.open(server.url)
    page.ask("Hello?")
    assert page.text(".note.wrong") == "The server cannot be reached."
    page.until("document.getElementById('state').textContent === 'cannot be reached'")


class HangsUp(BaseHTTPRequestHandler):
    """A server that is killed in the middle of an answer."""

    def do_GET(self) -> None:
        state = b'{"running": 0, "queued": 0, "data": [{"id": "demo", "context_length": 4096}]}'
        self._answer(PAGE.read_bytes() if self.path == "/" else state, "text/html" if self.path == "/" else "text/json")

    def do_POST(self) -> None:
        chunk = {"choices": [{"delta": {"content": "It is"}, "finish_reason": None}]}
        self._answer(f"data: {json.dumps(chunk)}\n\n".encode(), "text/event-stream", n_missing=100)
        time.sleep(0.3)  # a browser drops what it has not handed over when a connection breaks

    def _answer(self, content: bytes, kind: str, n_missing: int = 0) -> None:
        self.send_response(200)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(content) + n_missing))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_a_connection_that_is_lost_is_noticed(page: Page) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), HangsUp) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            page.open(f"http://127.0.0.1:{server.server_port}/")
            assert page.ask("What?") == "It is"
            assert page.text(".note.wrong") == "The connection was lost before the answer ended."
        finally:
            server.shutdown()
            thread.join()


def test_a_key_is_asked_for_and_forgotten_with_the_tab(serve: Serve, page: Page) -> None:
    with serve(api_key="a secret") as server:
        page.open(server.url)
        assert page.text("#model") == "stepgguf"
        page.type("wrong" + ENTER, "#key-field")
        page.ask("Hello")
        assert page.text(".note").startswith("the API key is wrong\nRequest ")
        page.run("document.getElementById('key-field').value = ''")
        page.type("a secret" + ENTER, "#key-field")
        page.until("document.getElementById('model').textContent === 'demo'")
        assert page.text("#key") == ""
        page.click(".again")
        assert page.answer() != ""
        assert page.run("return JSON.stringify(localStorage).includes('a secret')") is False
        assert page.run("return sessionStorage.getItem('stepgguf.key')") == "a secret"


def test_chats_are_kept_edited_exported_and_deleted(tell: Callable[..., None], page: Page) -> None:
    tell("Hm.", "</think>", "An answer.")
    page.ask("First?")
    page.ask("Second?")
    page.click(".question:nth-last-child(2) .edit")
    page.type(" Or third?" + ENTER, ".question textarea")
    page.answer()
    assert page.run("return [...document.querySelectorAll('.question > p')].map(p => p.textContent)") == [
        "First?",
        "Second? Or third?",
    ]
    page.click("aside > a")
    assert page.count(".message") == 0
    page.ask("Elsewhere?")
    page.reload()
    assert page.text(".question > p") == "Elsewhere?"
    assert page.run("return [...document.querySelectorAll('aside li a')].map(a => a.textContent)") == [
        "Elsewhere?",
        "First?",
    ]
    page.click("aside li:nth-child(2) a")
    page.until("document.querySelectorAll('.answer').length === 2")
    assert page.text(".answer:last-child .text") == "An answer."
    assert page.text(".answer:last-child summary").startswith("Thought for")
    page.click("#export")
    exported = json.loads(downloaded(page.downloads).read_text())
    assert exported["model"] == "demo"
    assert sorted(len(chat["messages"]) for chat in exported["chats"]) == [2, 4]
    page.click("aside li:nth-child(2) button")
    page.ask_driver("POST", "alert/accept")
    assert page.count(".message") == 0
    page.click("#delete-all")
    page.ask_driver("POST", "alert/accept")
    assert page.count("aside li") == 0
    assert page.run("return Object.keys(localStorage)") == ["stepgguf.settings"]


def test_two_chats_are_answered_at_a_time(tell: Callable[..., None], page: Page) -> None:
    go_on = threading.Event()
    tell("</think>", "One", go_on, " answer.")
    page.send("First?")
    page.until("document.querySelector('.text').textContent === 'One'")
    page.click("aside > a")
    page.send("Second?")
    page.until("document.querySelector('.text')?.textContent === 'One'")
    page.click("aside li:last-child a")
    page.until("document.querySelector('.question > p')?.textContent === 'First?'")
    go_on.set()
    assert page.answer() == "One answer."
    page.click("aside li:first-child a")
    page.until("document.querySelector('.question > p')?.textContent === 'Second?'")
    assert page.answer() == "One answer."


def test_the_page_follows_the_answer_only_from_the_bottom(tell: Callable[..., None], page: Page) -> None:
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
def test_nothing_is_wider_than_the_window(tell: Callable[..., None], page: Page, width: int) -> None:
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
