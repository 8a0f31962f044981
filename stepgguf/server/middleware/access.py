"""Who may ask: the names that this server goes by, and the API key."""

from __future__ import annotations

import hmac
import ipaddress
import re

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from stepgguf.server.config import ServerConfig
from stepgguf.server.problem import Refusal

# This machine as containers on it call it (Docker, Podman, Lima, OrbStack, minikube). Nobody can register `.internal`.
FROM_CONTAINERS = {f"host.{name}.internal" for name in ("docker", "containers", "lima", "orb", "minikube")}
OPEN_PATHS = {"/", "/health", "/docs", "/openapi.json"}  # nothing there is secret
STATIC = "/static"  # nor in the files below it


class HostCheck:
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
    """Whether only this machine can reach a server that is bound to `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class KeyCheck:
    """Lets in only who sends the API key, as `Authorization: Bearer KEY` or as `x-api-key: KEY`."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app, self._key = app, key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS and not scope["path"].startswith(f"{STATIC}/"):
            headers = Headers(scope=scope)
            scheme, _, bearer = headers.get("authorization", "").partition(" ")
            given = [headers.get("x-api-key", ""), bearer.strip() if scheme.lower() == "bearer" else ""]
            # In constant time, and as bytes: compare_digest takes no text beyond ASCII.
            right = [hmac.compare_digest(key.encode("latin-1"), self._key) for key in given]
            if not any(right):
                missing = not any(given)
                raise Refusal(
                    401,
                    "an API key is needed: Authorization: Bearer KEY" if missing else "the API key is wrong",
                    headers={"www-authenticate": "Bearer"},
                )
        await self._app(scope, receive, send)
