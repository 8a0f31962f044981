"""Asking and answering: what comes, what goes wrong, and answers that are found again."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain, cycle

import pytest

from stepgguf.chat.exchange import ChatModel
from stepgguf.errors import EngineDied
from stepgguf.server.config import ServerConfig
from stepgguf.server.routes.page import STATIC_FOLDER
from tests.scripted_engine import Pause, ScriptedEngine, UntilEndReasoning
from tests.server.browser import ENTER, ESCAPE, Page
from tests.server.conftest import Serve, Server, running
from tests.server.page.conftest import Tell, asked

pytestmark = pytest.mark.slow

LETTERS = "How many 'r's are in the word strawberry?"


def test_an_answer_streams_in_and_its_thinking_is_folded(server: Server, page: Page) -> None:
    page.open(server.url)
    assert (page.text("#model"), page.text("#context"), page.text("#state")) == ("demo", "4,096", "ready")
    assert asked(page, LETTERS, temperature="0") == "There are 3 'r's."
    assert page.text(".question").startswith(LETTERS)
    assert re.fullmatch(r"Thought for \d+\.\d s, 41 tokens", page.text("summary"))
    assert page.text(".answer .text") == "There are 3 'r's."
    assert re.fullmatch(
        r"41 thinking \+ 9 answer tokens( · [\d.,]+ tokens/s)? · first after \d+\.\d\d s · prompt 42, \d+ cached",
        page.text(".stats"),
    )
    page.until("document.getElementById('context').textContent === '92 of 4,096'")
    assert page.text(".thoughts") == ""
    page.click("summary")
    page.until("document.querySelector('.thoughts p')")
    assert page.text(".thoughts").startswith("Looking for r. Spelling it: s, t, r (1)")


def test_thinking_shows_how_it_goes_on(tell: Tell, page: Page) -> None:
    thinking, answering = threading.Event(), threading.Event()
    tell("Two ", "and two", thinking, " is four.", "</think>", "Four", answering, ".")
    page.send("2 + 2?")
    page.until("document.querySelector('.tail').textContent === 'Two and two'")
    first = page.text("summary b")
    assert re.fullmatch(r"Thinking \d\.\d s, [12] tokens(, [\d.,]+ tokens/s)?", first)
    page.until(f"document.querySelector('summary b').textContent !== {json.dumps(first)}")  # the clock goes on
    page.click("summary")
    page.until("document.querySelector('.thoughts').textContent === 'Two and two'")
    assert page.run("return document.querySelector('.stats').hidden")
    thinking.set()
    page.until("document.querySelector('.text').textContent === 'Four'")
    assert re.fullmatch(r"1 token · [\d.,]+ tokens/s", page.text(".stats"))
    assert page.text("summary b").startswith("Thought for")
    assert page.text(".thoughts") == "Two and two is four."
    answering.set()
    assert page.answer() == "Four."


@pytest.mark.parametrize(
    "stop", [lambda page: page.click("#stop"), lambda page: page.type(ESCAPE)], ids=["button", "key"]
)
def test_stop_keeps_what_there_is_and_frees_the_slot(page: Page, stop: Callable[[Page], None]) -> None:
    endless = ScriptedEngine(lambda request: chain(["</think>"], cycle(["There ", Pause(0.01)])))
    with running(ChatModel(endless), ServerConfig(model_ids=("demo",))) as server:
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


def test_settings_are_sent_and_nothing_else_is(tell: Tell, page: Page, scripted_engine: ScriptedEngine) -> None:
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
    prompt = scripted_engine.prompts[-1]
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


def test_a_refusal_is_shown_with_its_request(server: Server, page: Page) -> None:
    page.open(server.url)
    page.run("document.querySelector('#composer textarea').value = 'word '.repeat(5000)")
    page.ask(" ")
    refusal = r"context length is 4096 tokens[\s\S]* resulted in \d{4,5} tokens[\s\S]*\nRequest [0-9a-f]{24}$"
    assert re.search(refusal, page.text(".note.wrong"))
    asked(page, "Hello", temperature="3")
    assert "less than or equal to 2" in page.text(".answer:last-child .note")


def test_an_error_within_a_stream_is_shown_below_what_came(tell: Tell, page: Page) -> None:
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
    """A server that is killed in the middle of an answer, and after its restart knows nothing of it."""

    def do_GET(self) -> None:
        file = STATIC_FOLDER / ("index.html" if self.path == "/" else self.path.removeprefix("/static/"))
        if file.is_file():
            kinds = {".css": "text/css", ".html": "text/html", ".woff2": "font/woff2"}
            self._answer(file.read_bytes(), kinds.get(file.suffix, "text/javascript"))
        elif self.path.startswith("/v1/responses"):
            self._answer(b'{"error": {"message": "not found"}}', "application/json", status=404)
        else:
            state = b'{"running": 0, "queued": 0, "data": [{"id": "demo", "context_length": 4096}]}'
            self._answer(state, "application/json")

    def do_POST(self) -> None:
        created = {"type": "response.created", "response": {"id": "resp_1", "status": "in_progress"}}
        delta = {"type": "response.output_text.delta", "delta": "It is"}
        records = [
            f"data: {json.dumps({**event, 'sequence_number': i})}\n\n" for i, event in enumerate([created, delta])
        ]
        self._answer("".join(records).encode(), "text/event-stream", n_missing=100)
        time.sleep(0.3)  # a browser drops what it has not handed over when a connection breaks

    def _answer(self, content: bytes, kind: str, *, status: int = 200, n_missing: int = 0) -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(content) + n_missing))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_an_answer_that_the_server_has_no_more_is_kept_as_far_as_it_came(page: Page) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), HangsUp) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            page.open(f"http://127.0.0.1:{server.server_port}/")
            assert page.ask("What?") == "It is"
            assert page.text(".note").startswith("The server no longer has this answer.")
        finally:
            server.shutdown()
            thread.join()


def test_a_reload_finds_the_running_answer_again(tell: Tell, page: Page, scripted_engine: ScriptedEngine) -> None:
    thinking, answering, end = threading.Event(), threading.Event(), threading.Event()
    tell("Hm", thinking, ", so.", "</think>", "One", answering, " two", end, ".")
    page.send("Count")
    page.until("document.querySelector('.tail').textContent === 'Hm'")
    page.reload()
    page.until("document.querySelector('.tail')?.textContent === 'Hm'")
    page.until("document.getElementById('stop').checkVisibility()")
    thinking.set()
    page.until("document.querySelector('.text').textContent === 'One'")
    page.ask_driver("POST", "url", url="about:blank")  # the page is away while the answer goes on
    answering.set()
    page.until("true")
    page.ask_driver("POST", "back")
    page.until("document.querySelector('.text')?.textContent === 'One two'")
    end.set()
    assert page.answer() == "One two."
    assert page.text("summary").startswith("Thought for")
    assert len(scripted_engine.requests) == 1
    page.reload()
    assert page.answer() == "One two."


class Line(socketserver.ThreadingTCPServer):
    """A line to a server. `cut` breaks the connections that there are; while it is `dead`, what is sent is lost."""

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), Carry)
        self.dead = False
        self.to, self.open = ("127.0.0.1", port), list[socket.socket]()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def cut(self) -> None:
        while self.open:
            with contextlib.suppress(OSError):
                self.open.pop().shutdown(socket.SHUT_RDWR)

    def handle_error(self, *args: object) -> None:
        """A line that was cut."""


class Carry(socketserver.BaseRequestHandler):
    server: Line

    def handle(self) -> None:
        with socket.create_connection(self.server.to) as there:
            self.server.open += [self.request, there]
            carrying = threading.Thread(target=self._carry, args=(there, self.request), daemon=True)
            carrying.start()
            self._carry(self.request, there)
            carrying.join()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if not self.server.dead:
                    sink.sendall(data)
            sink.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def line(scripted: Server, page: Page) -> Iterator[Line]:
    with Line(scripted.port) as line:
        thread = threading.Thread(target=line.serve_forever)
        thread.start()
        yield line
        page.ask_driver("POST", "url", url="about:blank")
        line.cut()
        line.shutdown()
        thread.join()


@pytest.mark.parametrize("falls_silent", [False, True], ids=["breaks", "falls silent"])
def test_a_connection_that_ends_is_made_again(
    line: Line, page: Page, scripted_engine: ScriptedEngine, falls_silent: bool
) -> None:
    """As on a phone that was locked, or has changed its network."""
    go_on = threading.Event()
    scripted_engine.say("</think>", "One", go_on, " two.")
    page.open(line.url)
    page.run("const wait = setTimeout; window.setTimeout = (f, ms, ...rest) => wait(f, ms / 50, ...rest)")
    page.send("Count")
    page.until("document.querySelector('.text')?.textContent === 'One'")
    if falls_silent:
        line.dead = True
        go_on.set()
        scripted_engine.tickets[0].join()
        time.sleep(0.2)  # what is on the way is lost as well
        line.dead = False
    else:
        line.cut()
        go_on.set()
    assert page.answer() == "One two."
    assert len(scripted_engine.requests) == 1


def test_answer_now_ends_the_thinking(tell: Tell, page: Page) -> None:
    tell("Let me think", UntilEndReasoning(), "</think>", "Four.")
    page.send("2 + 2?")
    page.until("document.querySelector('.tail').textContent === 'Let me think'")
    assert page.text(".answer-now") == "Answer now"
    page.click(".answer-now")
    assert page.answer() == "Four."
    assert page.text(".answer-now") == ""


def test_stop_before_the_answer_has_a_name_ends_it_too(tell: Tell, page: Page, scripted_engine: ScriptedEngine) -> None:
    tell(threading.Event())
    page.run("document.querySelector('#composer textarea').value = 'Go'")
    page.run("document.querySelector('#composer').requestSubmit(); document.getElementById('stop').click()")
    page.answer()
    assert page.text(".note") == "Stopped."
    assert scripted_engine.tickets[0].cancelled.wait(5)


def test_a_wrong_key_says_so_and_another_can_be_typed(serve: Serve, page: Page) -> None:
    with serve(api_key="a secret") as server:
        page.open(server.url)
        assert page.text("#model") == "stepgguf"
        assert page.text("#key-problem") == ""
        page.type("wrong" + ENTER, "#key-field")
        page.until("document.getElementById('key-problem').textContent")
        assert page.text("#key-problem") == "The server does not take this key. Please type it again."
        assert page.run("return document.activeElement.id") == "key-field"
        assert page.run("return document.getElementById('key-field').ariaInvalid") == "true"
        page.ask("Hello")
        assert page.text(".note").startswith("an API key is needed")
        page.type("a secret" + ENTER, "#key-field")
        page.until("document.getElementById('model').textContent === 'demo'")
        assert page.text("#key") == ""
        page.click(".again")
        assert page.answer() != ""
        assert page.count(".versions") == 0  # an answer that never came is no version
        assert page.run("return JSON.stringify(localStorage).includes('a secret')") is False
        assert page.run("return sessionStorage.getItem('stepgguf.key')") == "a secret"


def test_an_answer_goes_on_with_the_right_key(serve: Serve, page: Page) -> None:
    with serve(api_key="a secret") as server:
        page.open(server.url)
        page.type("a secret" + ENTER, "#key-field")
        page.until("document.getElementById('model').textContent === 'demo'")
        page.click("#settings-button")
        page.type("0", "[name=temperature]")
        page.click("#settings form button")
        page.send(LETTERS)
        page.until("document.querySelector('.answer')")
        page.run("sessionStorage.clear()")
        page.reload()
        page.until("!document.getElementById('key').hidden")
        page.type("a secret" + ENTER, "#key-field")
        page.until("document.querySelector('.text').textContent === \"There are 3 'r's.\"")
