"""One exchange over HTTP: what it reads, and that whoever waits for it can be woken."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest

from stepgguf.runtime.http_events import ConnectionLost, HttpExchange, ServerAddress

pytestmark = pytest.mark.slow

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"


@contextmanager
def saying(*replies: bytes, request: list[bytes] | None = None) -> Iterator[ServerAddress]:
    """A server that answers one request with these bytes, and then says nothing until its client goes."""

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            data = connection.recv(65536)
            while length := re.search(rb"Content-Length: (\d+)", data):  # the body may come after the head
                if len(data.partition(b"\r\n\r\n")[2]) >= int(length[1]):
                    break
                data += connection.recv(65536)
            if request is not None:
                request.append(data)
            for reply in replies:
                connection.sendall(reply)
            while connection.recv(65536):
                pass

    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield ServerAddress.parse(f"http://127.0.0.1:{listener.getsockname()[1]}")
        thread.join(timeout=10)
        assert not thread.is_alive()


def opened(address: ServerAddress) -> HttpExchange:
    exchange = HttpExchange(address, {"X-Key": "secret"})
    exchange.connect(5)
    return exchange


def test_events_are_the_data_lines_whatever_else_a_server_sends() -> None:
    request: list[bytes] = []
    data = b": ping\r\n\r\nid: 7\nevent: x\ndata: {}\r\n\r\ndata:{1}\n\ndata:  two\n\n"
    with saying(HEAD + data[:9], data[9:40], data[40:], request=request) as address, opened(address) as exchange:
        assert exchange.send("/v1/x", {"a": 1}, seconds=5) == 200
        events = exchange.events(seconds=5)
        assert [next(events) for _ in range(3)] == ["{}", "{1}", " two"]
    assert request[0].startswith(b"POST /v1/x HTTP/1.1\r\n")
    assert b"X-Key: secret\r\n" in request[0]
    assert request[0].endswith(b'\r\n\r\n{"a": 1}')


def test_a_document_is_read_as_far_as_is_asked() -> None:
    reply = HEAD.replace(b"\r\n\r\n", b"\r\nContent-Length: 6\r\n\r\n") + b"abcdef"
    with saying(reply) as address, opened(address) as exchange:
        assert exchange.send("/", seconds=5) == 200
        assert exchange.read(4) == b"abcd"


@pytest.mark.parametrize(
    "replies", [(), (HEAD,), (HEAD + b"data: half",)], ids=["no head", "no event", "half an event"]
)
def test_whoever_waits_is_woken_by_an_interrupt_of_another_thread(replies: tuple[bytes, ...]) -> None:
    ended: list[float] = []

    def read() -> None:
        with contextlib.suppress(ConnectionLost):  # or it sees the end of the answer
            exchange.send("/", {}, seconds=None)
            list(exchange.events(seconds=None))
        ended.append(time.monotonic())

    with saying(*replies) as address:
        exchange = opened(address)  # closed when nobody reads any more: else closing would wait for the reader
        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        time.sleep(0.2)
        assert not ended
        interrupted = time.monotonic()
        exchange.interrupt()
        reader.join(5)
        assert ended
        assert ended[0] - interrupted < 1
        exchange.interrupt()  # again it does nothing
        exchange.close()


def test_an_interrupt_before_there_is_a_connection_holds() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        exchange = HttpExchange(ServerAddress.parse(f"http://127.0.0.1:{listener.getsockname()[1]}"), {})
        exchange.interrupt()
        with exchange, pytest.raises(ConnectionLost, match="interrupted"):
            exchange.connect(5)


def test_a_silent_server_is_given_up() -> None:
    with saying() as address, opened(address) as exchange, pytest.raises(ConnectionLost, match="timed out"):
        exchange.send("/", seconds=0.2)
    with saying(HEAD) as address, opened(address) as exchange:
        assert exchange.send("/", seconds=5) == 200
        with pytest.raises(ConnectionLost, match="timed out"):
            next(exchange.events(seconds=0.2))


def test_proxies_of_the_environment_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    with saying(HEAD) as address, opened(address) as exchange:
        assert exchange.send("/", seconds=5) == 200


def test_a_header_that_cannot_be_is_said() -> None:
    with saying() as address, HttpExchange(address, {"X-Key": "a\nb"}) as exchange:
        exchange.connect(5)
        with pytest.raises(ConnectionLost, match="Invalid header value"):
            exchange.send("/", seconds=5)


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        ("http://127.0.0.1:8080", ("http", "127.0.0.1", 8080, "")),
        ("https://host/prefix/", ("https", "host", None, "/prefix")),
        ("http://[::1]:9", ("http", "::1", 9, "")),
        ("http://[::1]", ("http", "::1", None, "")),
    ],
)
def test_addresses(url: str, parts: tuple[str, str, int | None, str]) -> None:
    address = ServerAddress.parse(url)
    assert (address.scheme, address.host, address.port, address.path) == parts
    assert address.url == url.rstrip("/")


def test_an_ipv6_address_without_a_port_is_not_taken_for_one_with_a_port() -> None:
    with HttpExchange(ServerAddress.parse("http://[::1]"), {}) as exchange, pytest.raises(ConnectionLost) as lost:
        exchange.connect(1)
    assert not isinstance(lost.value.__cause__, socket.gaierror)


@pytest.mark.parametrize("url", ["x", "host:80", "ftp://x", "http://", "http://x:99999", "http://x:y", "http://a b:1"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        ServerAddress.parse(url)
