"""What stands before the routes: who may ask, how much, and what a refusal looks like."""

from __future__ import annotations

import json
import logging
import re

import httpx
import pytest

from tests.server.conftest import Serve, Server

CHAT = "/v1/chat/completions"
JSON = {"content-type": "application/json"}


def answer(connection) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body, until the server closes or the body is complete."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += connection.recv(65536)
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    while len(body) < int(headers.get("content-length", 0)):
        body += connection.recv(65536)
    return int(first.split()[1]), headers, body


def test_every_answer_has_its_own_id(server: Server) -> None:
    ids = set()
    for response in (
        server.client.get("/health", headers={"x-request-id": "mine"}),
        server.client.get("/nowhere"),
        server.client.post(CHAT, json={}),
        server.client.get("/v1/models"),
    ):
        assert re.fullmatch(r"[0-9a-f]{24}", response.headers["x-request-id"])
        assert response.headers["request-id"] == response.headers["x-request-id"]
        ids.add(response.headers["x-request-id"])
    assert len(ids) == 4


def test_the_log_has_the_id_and_the_tokens_but_no_text(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "stepgguf.server"):
        response = server.client.post(
            CHAT,
            json={"messages": [{"role": "user", "content": "Hello secret"}], "max_tokens": 3, "temperature": 0},
            headers={"x-request-id": "theirs-1"},
        )
        server.client.post(CHAT, json={"messages": [{"role": "user", "content": ["secret"]}]})
        server.client.get("/v1/models", headers={"x-request-id": "<b>bad</b>"})
        server.client.get("/health")
        server.client.get("/metrics")
    trace = response.headers["x-request-id"]
    assert any(
        re.search(rf"POST .*{CHAT}. 200 \d+ ms {trace} \d+\+3 tokens client=theirs-1", m) for m in caplog.messages
    )
    assert "secret" not in caplog.text
    assert "<b>" not in caplog.text
    assert "/v1/models" in caplog.text
    assert "/health" not in caplog.text
    assert "/metrics" not in caplog.text


@pytest.mark.slow
def test_a_key_is_asked_for_everywhere_but_where_nothing_is_secret(serve: Serve) -> None:
    with serve(api_key="sésame") as server:
        for path in ("/v1/models", "/metrics", "/v1/nowhere"):
            response = server.client.get(path)
            assert response.status_code == 401
            assert response.json()["error"]["type"] == "authentication_error"
            assert response.json()["error"]["code"] == "invalid_api_key"
        for path in ("/", "/docs", "/openapi.json", "/health"):
            assert server.client.get(path).status_code == 200
        key = "sésame".encode()
        for name, value in (
            (b"Authorization", b"Bearer " + key),
            (b"authorization", b"bearer " + key),
            (b"X-Api-Key", key),
        ):
            assert server.client.get("/v1/models", headers={name: value}).status_code == 200
        for name, value in (("Authorization", "Bearer x"), ("Authorization", "Basic sesame"), ("X-Api-Key", "ü")):
            response = server.client.get("/v1/models", headers={name: value.encode()})
            assert response.status_code == 401


def test_messages_refuse_in_anthropics_form(serve: Serve) -> None:
    with serve(api_key="k") as server:
        body = server.client.post("/v1/messages", json={}).json()
    assert body["type"] == "error"
    assert body["error"]["type"] == "authentication_error"
    assert set(body) == {"type", "error", "request_id"}


@pytest.mark.slow
def test_a_page_that_renamed_itself_is_not_answered(server: Server) -> None:
    response = server.client.get("/v1/models", headers={"host": f"evil.example:{server.port}"})
    assert response.status_code == 403
    assert "--allowed-host" in response.json()["error"]["message"]
    for host in (
        *(f"localhost:{server.port}", "127.0.0.1", "[::1]:80", "LOCALHOST", "192.168.1.7:8080", "chat.localhost"),
        *("host.docker.internal:8080", "host.containers.internal"),
    ):
        assert server.client.get("/v1/models", headers={"host": host}).status_code == 200


@pytest.mark.slow
def test_another_name_can_be_allowed(serve: Serve) -> None:
    with serve(allowed_hosts=("Spark.local",)) as server:
        assert server.client.get("/health", headers={"host": "spark.local:80"}).status_code == 200


BODY = json.dumps({"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}).encode()
FORM = "application/x-www-form-urlencoded"  # what curl -d says


@pytest.mark.slow
@pytest.mark.parametrize(
    "said", [None, FORM, "application/octet-stream", "Application/JSON; charset=utf-8", "x/y+json"]
)
def test_a_program_need_not_say_that_its_body_is_json(server: Server, said: str | None) -> None:
    headers = {} if said is None else {"content-type": said}
    for path in (CHAT, "/v1/completions", "/tokenize"):
        body = BODY if path == CHAT else b'{"prompt": "a", "max_tokens": 1}' if "v1" in path else b'{"text": "a"}'
        assert server.client.post(path, content=body, headers=headers).status_code == 200


@pytest.mark.slow
@pytest.mark.parametrize(
    "said", [None, FORM, "text/plain", "text/plain; application/json", "multipart/form-data", "x/y"]
)
@pytest.mark.parametrize(
    "mark",
    [{"origin": "http://evil.example"}, {"origin": "null"}, {"origin": "http://["}, {"sec-fetch-site": "cross-site"}],
)
def test_what_a_web_page_can_send_unasked_is_not_read(server: Server, said: str | None, mark: dict[str, str]) -> None:
    headers = mark if said is None else {**mark, "content-type": said}
    assert server.client.post(CHAT, content=BODY, headers=headers).status_code == 415


def test_the_servers_own_page_need_not_say_it_either(server: Server) -> None:
    for mark in ({"origin": server.url}, {"sec-fetch-site": "same-origin"}):
        assert server.client.post(CHAT, content=BODY, headers=mark).status_code == 200


def test_a_form_of_text_is_not_read_whoever_sends_it(server: Server) -> None:
    for said in ("text/plain", "multipart/form-data; boundary=x"):
        assert server.client.post(CHAT, content=BODY, headers={"content-type": said}).status_code == 415


def test_cors_is_off_and_can_be_switched_on(server: Server, serve: Serve) -> None:
    asks = {"origin": "http://app.example", "access-control-request-method": "POST"}
    assert "access-control-allow-origin" not in server.client.get("/health", headers=asks).headers
    with serve(cors_origins=("http://app.example",), api_key="k") as open_server:
        preflight = open_server.client.options(
            CHAT, headers={**asks, "access-control-request-headers": "authorization"}
        )
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == "http://app.example"
        refused = open_server.client.post(CHAT, json={}, headers=asks)
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "http://app.example"  # or the page could not read it


def test_a_body_that_says_it_is_too_large_is_not_read(serve: Serve) -> None:
    with serve(max_body_bytes=1000) as server:
        with server.raw(f"POST {CHAT} HTTP/1.1\nHost: localhost\nContent-Length: 99999999999\n\n") as connection:
            status, _, body = answer(connection)
        assert status == 413
        assert json.loads(body)["error"]["code"] == "request_too_large"


@pytest.mark.slow
def test_a_body_that_grows_too_large_is_cut_off(serve: Serve) -> None:
    with serve(max_body_bytes=1000) as server:
        response = server.client.post(CHAT, content=(b"x" * 300 for _ in range(5)), headers=JSON)
        assert response.status_code == 413
        assert server.client.post(CHAT, content=(b" " * 300 for _ in range(3)), headers=JSON).status_code == 400


@pytest.mark.slow
def test_a_body_that_does_not_come_times_out(serve: Serve) -> None:
    with serve(body_seconds=0.3) as server:
        head = f"POST {CHAT} HTTP/1.1\nHost: localhost\nContent-Type: application/json\nContent-Length: 100\n\n"
        with server.raw(head, b"{") as connection:
            assert answer(connection)[0] == 408
            assert connection.recv(1) == b""  # and the connection is closed


@pytest.mark.slow
@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a":' * 200 + b"1" + b"}" * 200,
        b'{"messages":[{"role":"user","content":"x"}],"temperature":NaN}',
        b'{"messages":[{"role":"user","content":"x"}],"temperature":1e999}',
        b'{"messages":[{"role":"user","content":"x"}],"seed":' + b"9" * 5000 + b"}",
        b"[]",
        b'"text"',
        b"null",
    ],
    ids=lambda body: body[:30].decode(errors="replace"),
)
def test_bodies_that_are_no_request(server: Server, body: bytes) -> None:
    response = server.client.post(CHAT, content=body, headers=JSON)
    assert response.status_code == 400
    assert response.json()["error"]["object"] == "error"
    assert len(response.json()["error"]["message"]) < 300


def test_a_head_that_is_too_large_is_refused(server: Server) -> None:
    """As soon as more than the limit is there and no end. What comes in one read may be larger."""
    with server.raw(f"GET /health HTTP/1.1\nHost: localhost\nX: {'x' * 70_000}") as connection:
        assert b" 400 " in connection.recv(65536).split(b"\r\n")[0]


def test_where_there_is_nothing_it_says_what_there_is(server: Server) -> None:
    response = server.client.get("/v1/chat")
    assert response.status_code == 404
    assert response.json()["error"]["message"] == "there is no GET /v1/chat; /docs lists what there is"
    assert server.client.get(CHAT).status_code == 405


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("/chat/completions", "it is /v1/chat/completions"),
        ("/v1/v1/chat/completions", "it is /v1/chat/completions"),
        ("/api/v1/models", "it is /v1/models"),
        ("/openai/v1/responses/", "it is /v1/responses"),
        ("/messages", "it is /v1/messages"),
        ("/v1/v1/messages", "it is /v1/messages"),
        ("/v1/", "the base URL"),
        ("/completion", "it is /v1/completions"),
        ("/api/chat", "not Ollama's"),
    ],
)
def test_a_client_at_the_wrong_address_is_told_its_base_url(server: Server, asked: str, said: str) -> None:
    response = server.client.post(asked, json={})
    assert response.status_code == 404
    message = response.json()["error"]["message"]
    assert said in message
    assert f"OpenAI's clients is {server.url}/v1, that of Anthropic's {server.url}" in message


def test_a_defect_of_ours_is_a_500_without_a_traceback(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: object) -> None:
        raise ZeroDivisionError("sk-secret")

    monkeypatch.setattr("stepgguf.chat.exchange.ChatModel.prepare", broken)
    response = server.chat()
    assert response.status_code == 500
    assert response.headers["x-should-retry"] == "false"
    assert "ZeroDivisionError" not in response.text
    assert "sk-secret" not in response.text
    assert response.headers["x-request-id"] in response.json()["error"]["request_id"]
    assert any(record.exc_info and response.headers["x-request-id"] in record.message for record in caplog.records)


@pytest.mark.slow
def test_metrics_count_requests_tokens_and_drafts(server: Server) -> None:
    def value(name: str) -> float:
        text = server.client.get("/metrics").text
        return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name))

    names = ("stepgguf_generated_tokens_total", "stepgguf_time_to_first_token_seconds_count")
    before = [value(name) for name in names]
    served = 'stepgguf_http_requests_total{method="POST",route="/v1/chat/completions",status="200"}'
    n_served = value(served)
    generated = server.chat().json()["usage"]["completion_tokens"]
    after = [value(name) for name in names]
    assert after[0] - before[0] == generated
    assert after[1] - before[1] == 1
    assert value(served) == n_served + 1
    assert value('stepgguf_drafted_tokens_total{head="0"}') >= value('stepgguf_accepted_tokens_total{head="0"}') > 0
    server.client.request("BREW", "/v1/models")
    assert value('stepgguf_http_requests_total{method="OTHER"') > 0


def test_the_pages_load_nothing_from_elsewhere(server: Server) -> None:
    for path in ("/", "/docs"):
        response = server.client.get(path)
        assert response.headers["content-type"].startswith("text/html")
        assert "default-src 'self'" in response.headers["content-security-policy"]
        assert not re.search(r"(src|href)=\"?(https?:)?//", response.text)


def test_an_idle_connection_is_reused(server: Server) -> None:
    with httpx.Client(base_url=server.url) as client:
        ports = set()
        for _ in range(3):
            with client.stream("GET", "/health") as response:
                ports.add(response.extensions["network_stream"].get_extra_info("client_addr"))
                response.read()
    assert len(ports) == 1
