"""Request bodies: models that accept what they know and name what they do not.

A field is honoured, or it is in `Ignored` with the reason, or unknown.py says what becomes of it. Null means absent, as
clients send it.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from typing import Any, ClassVar

from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, TypeAdapter, ValidationError, model_validator
from pydantic_core import CoreSchema, PydanticCustomError
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from stepgguf.server.json_text import parse
from stepgguf.server.problems import Refusal, explain
from stepgguf.server.unknown import LONGEST_NAME, POLICY, UnknownFields, namesake, near_miss

WITHOUT_EFFECT = "Accepted, without effect"
MOST_UNKNOWN = 64  # fields of one object; no vendor has as many


def _fail_fast(schema: Any) -> None:
    """Of every list in it, as pydantic's FailFast does for one."""
    if isinstance(schema, dict):
        if schema.get("type") == "list":
            schema["fail_fast"] = True
        schema = list(schema.values())
    if isinstance(schema, list):
        for part in schema:
            _fail_fast(part)


class Part(BaseModel):
    """An object of a request, which may carry more than is read of it, because its makers keep adding to it. Null is
    absence: clients send it for what they do not set. The first wrong item of a list refuses it: half a million
    explanations would take seconds to collect."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False, protected_namespaces=())

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler(source)
        _fail_fast(schema)
        return schema

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
        unknown = [name for name, value in data.items() if value is not None and name not in names]
        if not unknown:
            return data
        if len(unknown) > MOST_UNKNOWN:
            raise _refused(unknown[0], f"it and {len(unknown) - 1} more are unknown fields")
        with_effect = [
            name for name, field in names.items() if not (field.description or "").startswith(WITHOUT_EFFECT)
        ]
        policy = POLICY.get(UnknownFields())
        for name in unknown:
            if name in cls.elsewhere:
                raise _refused(name, cls.elsewhere[name])
            if (near := near_miss(name, with_effect)) is not None:
                raise _refused(name, f"unknown field; did you mean {near}?")
            if (other := namesake(name, with_effect)) is not None:
                raise _refused(name, f"unknown field; here it is {other}. {names[other].description or ''}".rstrip())
            if policy.strict:
                raise _refused(name, "unknown field, and this server is strict")
        policy.ignore("field", unknown)
        return data


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


class JsonRoute(APIRoute):
    """Reads a body with `JsonRequest`, and does with unknown fields what this server does."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()
        model = TypeAdapter(self.body_field.field_info.annotation if self.body_field is not None else Any)

        async def handle(request: Request) -> Response:
            POLICY.set(request.app.state.service.unknown)
            return await handler(JsonRequest(request, model))

        return handle


class JsonRequest(Request):
    """A request whose JSON becomes the route's model off the event loop, since a large body takes a while. FastAPI, which
    validates on the event loop, then finds an instance and has nothing to do."""

    def __init__(self, request: Request, model: TypeAdapter[Any]) -> None:
        super().__init__(request.scope, request.receive)
        self._model = model

    async def json(self) -> Any:
        depth = self.app.state.service.config.max_json_depth
        return await run_in_threadpool(_read, await self.body(), depth, self._model)


def _read(body: bytes, depth: int, model: TypeAdapter[Any]) -> Any:
    value = parse(body, depth)
    try:
        return model.validate_python(value)
    except ValidationError as error:
        message, param = explain(error.errors(include_url=False), value)
        raise Refusal(400, message, param=param) from None
