"""Which bodies are let in: what a web page of somebody else could send is not, nor what is too large or too slow."""

from __future__ import annotations

import time

from anyio import fail_after
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stepgguf.server.config import ServerConfig
from stepgguf.server.problem import Refusal

JSON = "application/json"


class ContentTypeCheck:
    """Has every body read as JSON, whatever else it says it is: curl says form.

    It refuses what a web page of somebody else could send to a server on this machine without asking the browser's
    permission: forms, text, or no type at all. Browsers say where such a post comes from; text is refused without that
    too, as older ones leave it out of forms, and a form of text can be made to look like JSON, which a urlencoded one
    cannot.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            headers = MutableHeaders(scope=scope)
            content_type = headers.get("content-type", "").partition(";")[0].strip().lower()
            unasked = _is_from_elsewhere(headers) or content_type.startswith(("text/", "multipart/"))
            if unasked and not content_type.endswith(("/json", "+json")):
                raise Refusal(415, f"the body must be JSON and say so: content-type: {JSON}")
            headers["content-type"] = JSON  # FastAPI reads no other body
        await self._app(scope, receive, send)


def _is_from_elsewhere(headers: Headers) -> bool:
    """Whether a web page that is not this server's own sends it."""
    if (origin := headers.get("origin")) is not None:
        return origin.partition("://")[2] != headers.get("host")
    return headers.get("sec-fetch-site", "none") not in ("none", "same-origin")


class SizeLimit:
    """Lets in bodies of at most max_body_bytes, sent in at most body_seconds."""

    def __init__(self, app: ASGIApp, config: ServerConfig) -> None:
        self._app, self._limit, self._seconds = app, config.max_body_bytes, config.body_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        content_length = Headers(scope=scope).get("content-length", "0")
        if content_length.isdecimal() and int(content_length) > self._limit:
            raise self._too_large()
        n_read, complete = 0, False
        deadline = time.monotonic() + self._seconds

        async def limited() -> Message:
            nonlocal n_read, complete
            if complete:  # what is left to come is the news that the client has gone, for as long as it takes
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
