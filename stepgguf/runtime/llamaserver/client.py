"""What llama-server says over HTTP: plain calls, and completions as streams of events.

POST /completion -> data: {"content", "tokens": [id], "tokens_predicted"}*  data: {"stop": true, "stop_type"}
                    data: {"prompt_progress": {"total", "cache", "processed"}}*   : ping
an error         -> {"error": {"code", "message", "type"}}, as a response or as the last event
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from stepgguf.errors import ContextLengthExceeded, EngineError, RequestError, StepggufError
from stepgguf.runtime.http_events import ConnectionLost, HttpExchange, ServerAddress, bearer_header

Json = dict[str, Any]  # whose shape is llama-server's to keep: whoever reads it may find a KeyError or a TypeError

_CONNECT_SECONDS = 10.0
_CALL_SECONDS = 60.0
_HEALTH_SECONDS = 2.0
_PING_SECONDS = 10  # llama-server sends a comment after so long a silence
_SILENCE_SECONDS = 90.0  # so long a silence means that the other machine is gone


class LlamaServerClient:
    """Speaks to one llama-server. Thread-safe: every call has a connection of its own.

    Every method may raise ConnectionLost, or what the server's own error says (see `error_of`).
    """

    def __init__(self, url: str, api_key: str | None) -> None:
        """Take the address: scheme, host, port and maybe a prefix of all paths. EngineError if it is none."""
        try:
            self._address = ServerAddress.parse(url)
        except ValueError:
            raise EngineError(
                f"{url!r} is not the address of a server", hint="Write it like http://127.0.0.1:8080."
            ) from None
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers |= bearer_header(api_key)

    @property
    def url(self) -> str:
        return self._address.url

    def get(self, path: str) -> Any:
        """Return the JSON that a GET brings: an object, or a list of them."""
        return self._call(path, None)

    def post(self, path: str, body: Mapping[str, object]) -> Any:
        """Return the JSON that a POST brings."""
        return self._call(path, body)

    def is_healthy(self) -> bool:
        """Whether it has loaded its model. Takes two seconds at most."""
        try:
            with HttpExchange(self._address, {}) as exchange:
                exchange.connect(_HEALTH_SECONDS)
                return exchange.send("/health", seconds=_HEALTH_SECONDS) == 200
        except ConnectionLost:
            return False

    def open_completion(self) -> HttpExchange:
        """Open a connection for one completion; nothing is sent yet. `interrupt` makes llama-server stop."""
        exchange = HttpExchange(self._address, self._headers)
        exchange.connect(_CONNECT_SECONDS)
        return exchange

    def events(self, exchange: HttpExchange, body: Json) -> Iterator[Json]:
        """Send a POST /completion and yield every event up to the one with "stop"."""
        body = {**body, "stream": True, "sse_ping_interval": _PING_SECONDS}
        # The head has no limit: the request may wait for its turn behind other clients of the server.
        if exchange.send("/completion", body, seconds=None) != 200:
            raise error_of(_parse(exchange.read()))
        for data in exchange.events(seconds=_SILENCE_SECONDS):
            event: Json = _parse(data)
            if "error" in event:
                raise error_of(event)
            yield event
            if event["stop"]:
                return
        raise ConnectionLost("the answer ended early")

    def _call(self, path: str, body: Mapping[str, object] | None) -> Any:
        with HttpExchange(self._address, self._headers) as exchange:
            exchange.connect(_CALL_SECONDS)
            status = exchange.send(path, body, seconds=_CALL_SECONDS)
            answer = _parse(exchange.read())
        if status != 200:
            raise error_of(answer)
        return answer


def error_of(answer: Json) -> StepggufError:
    """Return what llama-server's error body says, as one of our errors."""
    error = answer.get("error", answer)
    message, error_type = str(error.get("message", error)), error.get("type")
    if error_type == "exceed_context_size_error":
        return ContextLengthExceeded(error["n_prompt_tokens"], error["n_ctx"])
    if error_type == "invalid_request_error":
        return RequestError(f"llama-server refuses the request: {message}")
    if error_type == "authentication_error":
        return EngineError(f"llama-server: {message}", hint="Give the key that llama-server was started with.")
    return EngineError(f"llama-server: {message}")


def _parse(data: bytes | str) -> Any:
    try:
        return json.loads(data)
    except ValueError as error:
        raise EngineError(f"llama-server: {data[:200]!r} is not JSON", hint="Is this a llama-server?") from error
