"""The outermost layer: an id, a log line and a count for every request."""

from __future__ import annotations

import logging
import re
import secrets
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stepgguf.server.generation import Generation
from stepgguf.server.metrics import Metrics

log = logging.getLogger(__name__)
POLLED = {"/health", "/metrics"}  # every few seconds, by programs: not in the log
METHODS = {"GET", "POST", "DELETE", "OPTIONS", "HEAD", "PUT", "PATCH"}  # a label must not be the client's to choose
_SANE_ID = re.compile(r"[\w.:-]{1,64}")


class TraceRequests:
    """Gives every request an id, a log line and a count, and ends with it what was begun for it.

    The id goes out as x-request-id, and as request-id for Anthropic's clients. The client's own is only logged: it may
    be anything, twice. Of a request nothing is logged that its sender wrote, but the path and, once, the names of
    fields that are not known here.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.monotonic()
        trace = secrets.token_hex(12)
        scope.setdefault("state", {})["trace"] = trace
        status = 499  # nginx's: the client left before there was an answer

        async def traced(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = headers["request-id"] = trace
            await send(message)

        try:
            await self._app(scope, receive, traced)
        finally:
            generation: Generation | None = scope["state"].get("generation")
            if generation is not None:  # however it ended, nothing goes on for it
                generation.cancel()
            self._log_end(scope, generation, status, time.monotonic() - started)

    def _log_end(self, scope: Scope, generation: Generation | None, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "unmatched")
        self._metrics.count_request(scope["method"] if scope["method"] in METHODS else "OTHER", route, status)
        if scope["path"] in POLLED and status == 200:
            return
        line = f"{scope['method']} {scope['path']!a} {status} {seconds * 1000:.0f} ms {scope['state']['trace']}"
        if generation is not None:
            line += f" {generation.counts}"
        client_id = Headers(scope=scope).get("x-request-id", "")
        if _SANE_ID.fullmatch(client_id):
            line += f" client={client_id}"
        log.info(line)
        for warning in generation.warnings if generation is not None else ():
            log.warning("%s: %s", scope["state"]["trace"], warning)
