"""What stands before the routes. Plain ASGI: Starlette's BaseHTTPMiddleware would come between a stream and the news
that its reader has gone.

    Trace       an id, a log line and a count for every request; whatever was begun for it ends with it
     [CORS]     Starlette's; answers preflights, so before the key is asked for
      Errors    what anything inside raises becomes a body
       Host     the names this server goes by
        Key     the API key
         Form   what a web page of somebody else could send
          Size  how large a body may be, and how slow
"""

from __future__ import annotations

import hmac
import ipaddress
import logging
import re
import secrets
import time

from anyio import fail_after
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stepgguf.errors import StepggufError
from stepgguf.server.config import ServerConfig
from stepgguf.server.generation import Exchange
from stepgguf.server.metrics import Metrics
from stepgguf.server.problem import Refusal, body, problem

log = logging.getLogger(__name__)
OPEN = {"/", "/health", "/docs", "/openapi.json"}  # nothing there is secret
STATIC = "/static"  # nor in the files below it
POLLED = {"/health", "/metrics"}  # every few seconds, by programs: not in the log
# This machine as containers on it call it (Docker, Podman, Lima, OrbStack, minikube). Nobody can register `.internal`.
FROM_CONTAINERS = {f"host.{name}.internal" for name in ("docker", "containers", "lima", "orb", "minikube")}
JSON = "application/json"
METHODS = {"GET", "POST", "DELETE", "OPTIONS", "HEAD", "PUT", "PATCH"}  # a label must not be the client's to choose
_SANE_ID = re.compile(r"[\w.:-]{1,64}")


class Trace:
    """The id goes out as x-request-id, and as request-id for Anthropic's clients. The client's own is only logged: it
    may be anything, twice. Of a request nothing is logged that its sender wrote, but the path and, once, the names of
    fields that are not known here."""

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
            exchange: Exchange | None = scope["state"].get("exchange")
            if exchange is not None:  # however it ended, nothing goes on for it
                exchange.cancel()
            self._note(scope, exchange, status, time.monotonic() - started)

    def _note(self, scope: Scope, exchange: Exchange | None, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "unmatched")
        self._metrics.answered(scope["method"] if scope["method"] in METHODS else "OTHER", route, status)
        if scope["path"] in POLLED and status == 200:
            return
        line = f"{scope['method']} {scope['path']!a} {status} {seconds * 1000:.0f} ms {scope['state']['trace']}"
        if exchange is not None:
            line += f" {exchange.n_prompt}+{exchange.n_generated} tokens"
        theirs = Headers(scope=scope).get("x-request-id", "")
        if _SANE_ID.fullmatch(theirs):
            line += f" client={theirs}"
        log.info(line)
        for warning in exchange.warnings if exchange is not None else ():
            log.warning("%s: %s", scope["state"]["trace"], warning)


class Errors:
    """Exceptions to answers. After the head has gone out there is no answer left to give: the connection ends."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except (HTTPException, RequestValidationError, StepggufError) as error:
            if started:
                raise
            await _answer(error, scope, receive, send)
        except Exception as error:
            if started:
                raise
            log.exception("%s failed", scope["state"]["trace"])
            await _answer(error, scope, receive, send)


async def _answer(error: Exception, scope: Scope, receive: Receive, send: Send) -> None:
    found = problem(error)
    if found.status >= 500:
        log.error("%s: %s", scope["state"]["trace"], found.message)
    content = body(found, scope["path"], scope["state"]["trace"])
    await JSONResponse(content, found.status, dict(found.headers))(scope, receive, send)


class Host:
    """A server on a loopback address answers only to names of this machine. Else a web page could have its own name
    point here and read the answers (DNS rebinding). An address in place of a name points nowhere else, and `.localhost`
    never leaves the machine (RFC 6761)."""

    def __init__(self, app: ASGIApp, config: ServerConfig) -> None:
        self._app = app
        self._names = {"localhost", *FROM_CONTAINERS, *(name.lower() for name in (config.host, *config.allowed_hosts))}
        self._checks = is_loopback(config.host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._checks and scope["type"] == "http":
            host = Headers(scope=scope).get("host")
            name = re.sub(r":\d*$", "", host).lower() if host is not None else "localhost"
            if not (name in self._names or name.endswith(".localhost") or _is_address(name)):
                raise Refusal(
                    403,
                    f"this server listens on this machine only and does not go by the name {name!r}; "
                    "if that is a name of this machine or of a proxy on it, start the server with --allowed-host NAME",
                )
        await self._app(scope, receive, send)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Key:
    """`Authorization: Bearer KEY` or `x-api-key: KEY`."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app, self._key = app, key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN and not scope["path"].startswith(f"{STATIC}/"):
            headers = Headers(scope=scope)
            scheme, _, bearer = headers.get("authorization", "").partition(" ")
            given = [headers.get("x-api-key", ""), bearer.strip() if scheme.lower() == "bearer" else ""]
            right = [hmac.compare_digest(key.encode("latin-1"), self._key) for key in given]
            if not any(right):
                missing = not any(given)
                raise Refusal(
                    401,
                    "an API key is needed: Authorization: Bearer KEY" if missing else "the API key is wrong",
                    headers={"www-authenticate": "Bearer"},
                )
        await self._app(scope, receive, send)


class Form:
    """Whatever else it says it is, a body is read as JSON: curl says form. Not what a web page of somebody else could
    send to a server on this machine without asking the browser's permission: forms, text, or no type at all. Browsers
    say where such a post comes from; text is refused without that too, as older ones leave it out of forms, and a form
    of text can be made to look like JSON, which a urlencoded one cannot."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            headers = MutableHeaders(scope=scope)
            said = headers.get("content-type", "").partition(";")[0].strip().lower()
            unasked = _is_from_elsewhere(headers) or said.startswith(("text/", "multipart/"))
            if unasked and not said.endswith(("/json", "+json")):
                raise Refusal(415, f"the body must be JSON and say so: content-type: {JSON}")
            headers["content-type"] = JSON
        await self._app(scope, receive, send)


def _is_from_elsewhere(headers: Headers) -> bool:
    """Whether a web page that is not this server's own sends it."""
    if (origin := headers.get("origin")) is not None:
        return origin.partition("://")[2] != headers.get("host")
    return headers.get("sec-fetch-site", "none") not in ("none", "same-origin")


class Size:
    """Bodies of at most max_body_bytes, sent in at most body_seconds."""

    def __init__(self, app: ASGIApp, config: ServerConfig) -> None:
        self._app, self._limit, self._seconds = app, config.max_body_bytes, config.body_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        said = Headers(scope=scope).get("content-length", "0")
        if said.isdecimal() and int(said) > self._limit:
            raise self._too_large()
        n_read, complete = 0, False
        deadline = time.monotonic() + self._seconds

        async def limited() -> Message:
            nonlocal n_read, complete
            if complete:
                return await receive()
            try:
                with fail_after(max(0.0, deadline - time.monotonic())):
                    message = await receive()
            except TimeoutError:
                text = f"the body did not arrive within {self._seconds:g} s"
                raise Refusal(408, text, headers={"connection": "close"}) from None
            n_read += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if n_read > self._limit:
                raise self._too_large()
            return message

        await self._app(scope, limited, send)

    def _too_large(self) -> Refusal:
        return Refusal(413, f"the body is larger than {self._limit} bytes")
