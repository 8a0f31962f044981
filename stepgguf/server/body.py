"""Request bodies: JSON that is safe to look at, then models that accept what they know and name what they do not.

A field is honoured, or it is in `Ignored` with the reason, or the request is refused: a misspelt `temprature` must
not be a silent default. Null means absent, as clients send it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine, Mapping
from difflib import get_close_matches
from typing import Any, ClassVar

from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from stepgguf.server.problems import Refusal

TOO_DEEP = "the body is nested too deeply"


class Body(BaseModel):
    """An object of a request that may have no fields but its own. `elsewhere`: fields that other servers know, and
    what to say about them."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())
    elsewhere: ClassVar[Mapping[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _knows_its_fields(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name in data:
            if name not in cls.model_fields:
                near = get_close_matches(str(name), cls.model_fields, n=1)
                known = f"unknown field; did you mean {near[0]}?" if near else "unknown field"
                advice = cls.elsewhere.get(name, known)
                raise PydanticCustomError("unknown_field", "{advice}", {"field": name, "advice": advice})
        return data


class Part(BaseModel):
    """An object of a request that may carry more than is read of it, because its makers keep adding to it."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


def ignored(reason: str) -> Any:
    return Field(None, description=f"Accepted, without effect: {reason}.")


class Ignored(Body):
    """Fields of hosted services that mean nothing to a model on one's own machine."""

    user: Any = ignored("there is one user")
    metadata: Any = ignored("nothing is stored")
    store: Any = ignored("nothing is stored")
    service_tier: Any = ignored("there is one tier")
    safety_identifier: Any = ignored("nothing is reported to anyone")
    prompt_cache_key: Any = ignored("every prefix is found without a key")
    prompt_cache_retention: Any = ignored("the cache keeps what fits")
    cache_prompt: Any = ignored("prefixes are always reused")
    verbosity: Any = ignored("the model has no such switch; ask for it in a message")
    prediction: Any = ignored("it saves time, not more; drafts come from the MTP heads")
    transforms: Any = ignored("a prompt that does not fit is refused, not cut")
    route: Any = ignored("there is one model")
    models: Any = ignored("there is one model to fall back to")
    provider: Any = ignored("there is one provider")
    plugins: Any = ignored("there are none")
    usage: Any = ignored("usage is asked for by stream_options.include_usage")
    session_id: Any = ignored("prefixes are found by their tokens")


class JsonRoute(APIRoute):
    """Reads a body with `JsonRequest`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await handler(JsonRequest(request.scope, request.receive))

        return handle


class JsonRequest(Request):
    """The type must be said: a web page of somebody else may send text to a server on this machine without asking the
    browser's permission, but not JSON."""

    async def body(self) -> bytes:
        body = await super().body()
        if self.method == "POST" and "json" not in self.headers.get("content-type", ""):
            raise Refusal(415, "the body must be JSON and say so: content-type: application/json")
        return body

    async def json(self) -> Any:
        """Large bodies take a while: off the event loop."""
        depth = self.app.state.service.config.max_json_depth
        return await run_in_threadpool(_parse, await self.body(), depth)


def _parse(body: bytes, depth: int) -> Any:
    try:
        value = json.loads(body, parse_constant=_refuse)
        _look_into(value, depth)
    except RecursionError:
        raise Refusal(400, TOO_DEEP, code="invalid_json") from None
    except ValueError as error:
        raise Refusal(400, f"the body is not JSON: {error}", code="invalid_json") from None
    return value


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")


def _look_into(value: object, depth: int) -> None:
    """Everything that Python's parser lets through and that others stumble over. Goes down level by level."""
    level = [value]
    for _ in range(depth):
        inner: list[object] = []
        for item in level:
            if isinstance(item, str):
                item.encode()  # half a surrogate pair is a UnicodeEncodeError, which is a ValueError
            elif isinstance(item, dict):
                inner += item
                inner += item.values()
            elif isinstance(item, list):
                inner += item
        level = inner
        if not level:
            return
    raise Refusal(400, TOO_DEEP, code="invalid_json")
