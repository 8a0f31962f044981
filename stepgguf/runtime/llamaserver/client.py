"""HTTP to one llama-server: plain calls, and completions as streams of events.

    POST /completion -> data: {"content", "tokens": [id], "tokens_predicted"}*  data: {"stop": true, "stop_type"}
                        data: {"prompt_progress": {"total", "cache", "processed"}}*   : ping
    an error         -> {"error": {"code", "message", "type"}}, as a response or as the last event

Every call has a connection of its own: closing it is how llama-server is told to stop.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from stepgguf.errors import ContextLengthExceeded, EngineError, RequestError, StepggufError

Json = dict[str, Any]

_CALL_SECONDS = 60.0
_PING_SECONDS = 10  # llama-server sends a comment after so long a silence
_SILENCE_SECONDS = 90.0  # so long a silence means that the other machine is gone


class ConnectionLost(Exception):
    """The server closed the connection before the end of its answer, or cannot be reached."""


class Client:
    """Thread-safe. `url`: scheme, host, port and maybe a prefix. Every method may raise ConnectionLost."""

    def __init__(self, url: str, api_key: str | None) -> None:
        self.url = url.rstrip("/")
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise EngineError(f"{url!r} is not the address of a server", hint="Write it like http://127.0.0.1:8080.")
        self._host, self._port, self._prefix = parts.hostname, parts.port, parts.path
        self._connection = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def get(self, path: str) -> Any:
        return self._call("GET", path, None)

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        return self._call("POST", path, body)

    def is_healthy(self) -> bool:
        """Whether it has loaded its model. Takes two seconds at most."""
        connection = self._connection(self._host, self._port, timeout=2)
        try:
            connection.request("GET", f"{self._prefix}/health")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def completion(self) -> Completion:
        """A connection for one completion; nothing is sent yet."""
        connection = self._connection(self._host, self._port, timeout=10)
        try:
            connection.connect()
        except OSError as error:
            raise ConnectionLost(f"{self.url}: {error}") from error
        return Completion(connection, f"{self._prefix}/completion", self._headers)

    def _call(self, method: str, path: str, body: Mapping[str, Any] | None) -> Any:
        connection = self._connection(self._host, self._port, timeout=_CALL_SECONDS)
        try:
            text = None if body is None else json.dumps(body)
            connection.request(method, self._prefix + path, text, self._headers)
            response = connection.getresponse()
            answer = _parse(response.read())
        except (OSError, http.client.HTTPException) as error:
            raise ConnectionLost(f"{self.url}: {error}") from error
        finally:
            connection.close()
        if response.status != 200:
            raise problem(answer)
        return answer


class Completion:
    """One POST /completion. `interrupt` ends it from any thread; who reads its events then gets ConnectionLost."""

    def __init__(self, connection: http.client.HTTPConnection, path: str, headers: Mapping[str, str]) -> None:
        self._connection, self._path, self._headers = connection, path, headers
        self._socket: socket.socket = connection.sock

    def __enter__(self) -> Completion:
        return self

    def __exit__(self, *exc: object) -> None:
        self._connection.close()

    def events(self, body: Json) -> Iterator[Json]:
        """Send it and give every event up to the one with "stop". Errors of the server are raised."""
        try:
            self._socket.settimeout(None)  # it may wait for its turn behind other clients of the server
            body = {**body, "stream": True, "sse_ping_interval": _PING_SECONDS}
            self._connection.request("POST", self._path, json.dumps(body), dict(self._headers))
            response = self._connection.getresponse()
            if response.status != 200:
                raise problem(_parse(response.read()))
            self._socket.settimeout(_SILENCE_SECONDS)
            while line := response.readline():
                if line.startswith(b"data: "):
                    event = _parse(line[6:])
                    if "error" in event:
                        raise problem(event)
                    yield event
                    if event["stop"]:
                        return
        except (OSError, http.client.HTTPException) as error:
            raise ConnectionLost(str(error)) from error
        raise ConnectionLost("the answer ended early")

    def interrupt(self) -> None:
        with contextlib.suppress(OSError):  # it has been closed already
            self._socket.shutdown(socket.SHUT_RDWR)


def problem(answer: Json) -> StepggufError:
    """What llama-server's error body says, as one of our errors."""
    error = answer.get("error", answer)
    message, kind = str(error.get("message", error)), error.get("type")
    if kind == "exceed_context_size_error":
        return ContextLengthExceeded(error["n_prompt_tokens"], error["n_ctx"])
    if kind == "invalid_request_error":
        return RequestError(f"llama-server refuses the request: {message}")
    if kind == "authentication_error":
        return EngineError(f"llama-server: {message}", hint="Give the key that llama-server was started with.")
    return EngineError(f"llama-server: {message}")


def _parse(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError as error:
        raise EngineError(f"llama-server: {data[:200]!r} is not JSON", hint="Is this a llama-server?") from error
