"""Request bodies: JSON that is safe to look at, then models that accept what they know and name what they do not.

A field is honoured, or it is in `Ignored` with the reason, or unknown.py says what becomes of it. Null means absent, as
clients send it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, ClassVar

from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from stepgguf.server.problems import Refusal
from stepgguf.server.unknown import LONGEST_NAME, MOST_OF_ONE_REQUEST, REQUEST, OfOneRequest, namesake, near_miss

TOO_DEEP = "the body is nested too deeply"
WITHOUT_EFFECT = "Accepted, without effect"


class Part(BaseModel):
    """An object of a request, which may carry more than is read of it, because its makers keep adding to it. Null is
    absence: clients send it for what they do not set."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        return {name: value for name, value in data.items() if value is not None} if isinstance(data, dict) else data


class Body(Part):
    """An object whose unknown fields are looked at; see unknown.py. `elsewhere`: such whose meaning would be lost, and
    what to use instead. They are refused."""

    elsewhere: ClassVar[Mapping[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _knows_its_fields(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        names = {field.alias or name: field for name, field in cls.model_fields.items()}
        request = REQUEST.get(OfOneRequest())
        given = (name for name, value in data.items() if value is not None and name not in names)
        unknown = [name for name in given if (cls, name) not in request.ignored]
        if not unknown:
            return data
        if len(request.ignored) + len(unknown) > MOST_OF_ONE_REQUEST:
            raise _refused(unknown[0], f"the request has more than {MOST_OF_ONE_REQUEST} unknown fields")
        told = {name: field.description or "" for name, field in names.items()}
        known = {name: text for name, text in told.items() if not text.startswith(WITHOUT_EFFECT)}
        for name in unknown:
            advice = cls.elsewhere.get(name) or _advice(name, known, strict=request.server.strict)
            if advice is not None:
                raise _refused(name, advice)
        request.ignore(cls, unknown)
        return data


def _advice(name: str, known: Mapping[str, str], *, strict: bool) -> str | None:
    """What to say to who sends this field, if it is not to be ignored. known: fields and what they are."""
    if (near := near_miss(name, known)) is not None:
        return f"unknown field; did you mean {near}?"
    if (other := namesake(name, known)) is not None:
        return f"unknown field; here it is {other}. {known[other]}".rstrip()
    return "unknown field, and this server is strict" if strict else None


def _refused(field: str, advice: str) -> PydanticCustomError:
    return PydanticCustomError("unknown_field", "{advice}", {"field": field[:LONGEST_NAME], "advice": advice})


def ignored(reason: str) -> Any:
    return Field(None, description=f"{WITHOUT_EFFECT}: {reason}.", exclude=True)


class Ignored(Body):
    """Fields of hosted services that mean nothing to a model on one's own machine."""

    user: Any = ignored("there is one user")
    metadata: Any = ignored("nothing is stored")
    store: Any = ignored("nothing is stored")
    service_tier: Any = ignored("there is one tier")
    safety_identifier: Any = ignored("nothing is reported to anyone")
    moderation: Any = ignored("there is no moderation")
    prompt_cache_key: Any = ignored("every prefix is found without a key")
    prompt_cache_retention: Any = ignored("the cache keeps what fits")
    prompt_cache_options: Any = ignored("the cache keeps what fits")
    cache_prompt: Any = ignored("prefixes are always reused")
    verbosity: Any = ignored("the model has no such switch; ask for it in a message")
    prediction: Any = ignored("it saves time, not more; drafts come from the MTP heads")
    transforms: Any = ignored("a prompt that does not fit is refused, not cut")
    route: Any = ignored("there is one model")
    models: Any = ignored("there is one model to fall back to")
    provider: Any = ignored("there is one provider")
    plugins: Any = ignored("there are none")
    web_search_options: Any = ignored("nothing is searched here; offer a tool")
    usage: Any = ignored("usage is asked for by stream_options.include_usage")
    timings_per_token: Any = ignored("usage is asked for by stream_options.include_usage; speeds are in /metrics")
    session_id: Any = ignored("prefixes are found by their tokens")


class ExtraBody(Body):
    extra_body: dict[str, Any] | None = Field(
        None, description="As openai's library does with its argument of this name: fields for the body itself."
    )

    @model_validator(mode="before")
    @classmethod
    def _unpacked(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not isinstance(extra := data.get("extra_body"), dict):
            return data
        return {**extra, **{name: value for name, value in data.items() if name != "extra_body"}}


class JsonRoute(APIRoute):
    """Reads a body with `JsonRequest`, and does with unknown fields what this server does."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            REQUEST.set(OfOneRequest(request.app.state.service.unknown))
            return await handler(JsonRequest(request.scope, request.receive))

        return handle


class JsonRequest(Request):
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
