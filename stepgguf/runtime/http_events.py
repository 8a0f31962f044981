"""HTTP to one server: a JSON document, or server-sent events that another thread may break off.

    ServerAddress.parse(url)     HttpExchange(address, headers)     connect  send -> status  read | events     close
                                                                └────────── interrupt, from any thread ──────────┘

This is http.client and not httpx: closing an httpx response or client from another thread does not wake the thread that
reads from it (measured with 0.28), so a cancel had to shut the socket all the same, which httpx shows only once the
head of the answer has come. It would also cost four packages and 0.1 s at the start, and obeys proxies of the
environment unless told not to; http.client knows none, so a server on this machine is always reached directly.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from stepgguf.errors import EngineError

# What http.client raises when a connection fails or is shut under its reader: AttributeError and ValueError come from
# objects that the interrupting thread has just closed. A header with line breaks is a ValueError too.
_FAILURES = (OSError, ValueError, AttributeError, http.client.HTTPException)


class ConnectionLost(Exception):
    """A server cannot be reached, or broke off before its end. `__cause__` says more, where the system does."""


@dataclass(frozen=True, slots=True)
class ServerAddress:
    """Where a server listens. `path` stands before the paths of all requests and does not end in a slash."""

    scheme: Literal["http", "https"]
    host: str
    port: int | None
    path: str
    netloc: str

    @classmethod
    def parse(cls, url: str) -> ServerAddress:
        """Read an address such as http://127.0.0.1:8080. ValueError if it is none."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is not the address of a server")
        try:  # http.client knows which characters no name of a host can have
            http.client.HTTPConnection(parts.hostname, parts.port).close()
        except http.client.InvalidURL as error:
            raise ValueError(str(error)) from error
        scheme: Literal["http", "https"] = "https" if parts.scheme == "https" else "http"
        return cls(scheme, parts.hostname, parts.port, parts.path.rstrip("/"), parts.netloc)

    @property
    def url(self) -> str:
        """The address as a text that `parse` reads, without a slash at its end."""
        return f"{self.scheme}://{self.netloc}{self.path}"


def bearer_header(api_key: str) -> dict[str, str]:
    """Return the header that carries a server's key. EngineError, which does not show the key, if no header can."""
    if not all(" " <= character <= "~" for character in api_key):
        raise EngineError(
            "the API key holds a line break or another character that cannot be sent",
            hint="Give it without what stands around it, as the end of its line.",
        )
    return {"Authorization": f"Bearer {api_key}"}


class HttpExchange:
    """One request and its answer, over a connection of its own: closing that is how servers are told to stop.

    Every method may raise ConnectionLost, but `interrupt` and `close`.
    """

    def __init__(self, address: ServerAddress, headers: Mapping[str, str]) -> None:
        """Send nothing yet. The headers should hold the key, if the server wants one."""
        connection = http.client.HTTPSConnection if address.scheme == "https" else http.client.HTTPConnection
        # The port is always given: without one, http.client takes the last part of an IPv6 address for it.
        self._connection = connection(address.host, address.port or connection.default_port)
        self._path, self._headers = address.path, dict(headers)
        self._socket: socket.socket | None = None
        self._response: http.client.HTTPResponse | None = None
        self._interrupted = False

    def __enter__(self) -> HttpExchange:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def connect(self, seconds: float) -> None:
        """Connect, within so many seconds."""
        with _failures_as_connection_lost():
            self._connection.timeout = seconds
            self._connection.connect()
            self._socket = self._connection.sock
        if self._interrupted:  # before there was a socket that could be shut
            raise ConnectionLost("the request was interrupted")

    def send(self, path: str, body: object = None, *, seconds: float | None) -> int:
        """POST a body as JSON, or GET if there is none, and return the status of the answer.

        The head of the answer must come within so many seconds of silence; None waits for ever.
        """
        method, text = ("GET", None) if body is None else ("POST", json.dumps(body))
        with _failures_as_connection_lost():
            self._set_timeout(seconds)
            self._connection.request(method, self._path + path, text, self._headers)
            self._response = self._connection.getresponse()
            return self._response.status

    def read(self, most: int | None = None) -> bytes:
        """Return the body of the answer, or so many bytes of it at most."""
        assert self._response is not None
        with _failures_as_connection_lost():
            return self._response.read(most)

    def events(self, *, seconds: float | None) -> Iterator[str]:
        """Yield the data of each server-sent event, as it comes, until the server ends the answer. Every event is one
        line.

        So many seconds of silence are taken for the end of the connection; None waits for ever.
        """
        assert self._response is not None
        with _failures_as_connection_lost():
            self._set_timeout(seconds)
        while True:
            with _failures_as_connection_lost():
                line = self._response.readline()
            if not line:
                return
            field, _, value = line.decode(errors="replace").rstrip("\r\n").partition(":")
            if field == "data":
                yield value.removeprefix(" ")

    def interrupt(self) -> None:
        """End the exchange from any thread: who waits for it gets ConnectionLost or the end of the answer at once."""
        self._interrupted = True
        if self._socket is not None:
            # Shut and not closed: only that wakes a thread that reads. OSError: it has been closed already.
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Free the connection. Call it when no thread reads any more."""
        if self._response is not None:
            self._response.close()
        self._connection.close()

    def _set_timeout(self, seconds: float | None) -> None:
        assert self._socket is not None  # connect comes first
        self._socket.settimeout(seconds)


@contextlib.contextmanager
def _failures_as_connection_lost() -> Iterator[None]:
    try:
        yield
    except _FAILURES as error:
        raise ConnectionLost(str(error)) from error
