"""Request bodies: models that accept what they know and name what they do not.

A field is honoured, or it is in `Ignored` with the reason, or unknown.py says what becomes of it. Null means absent, as
clients send it.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from functools import cache
from inspect import get_annotations
from typing import Any, ClassVar

from fastapi.routing import APIRoute
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from stepgguf.server.body.json_text import parse
from stepgguf.server.body.unknown_fields import (
    LONGEST_NAME,
    MOST_OF_ONE_REQUEST,
    REQUEST,
    OfOneRequest,
    namesake,
    near_miss,
)
from stepgguf.server.problem import Refusal, explain

WITHOUT_EFFECT = "Accepted, without effect"
FIRST = ("model", "messages", "input")


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

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """The fields in the order of their use, as /docs shows them: FIRST, what is needed, the class's own, those
        of its bases, last what has no effect."""
        described = handler(schema)
        found = handler.resolve_ref_schema(described)
        fields, needed = cls.model_fields, found.get("required", ())
        declared = [name for kind in cls.__mro__ for name in get_annotations(kind) if name in fields]
        names = [fields[name].alias or name for name in declared]

        def rank(item: tuple[str, JsonSchemaValue]) -> tuple[bool, bool, bool, int]:
            name, told = item[0], item[1].get("description", "")
            return told.startswith(WITHOUT_EFFECT), name not in FIRST, name not in needed, names.index(name)

        found["properties"] = dict(sorted(found.get("properties", {}).items(), key=rank))
        return described

    @model_validator(mode="before")
    @classmethod
    def _knows_its_fields(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        names, request = _descriptions(cls), REQUEST.get(OfOneRequest())
        given = (name for name, value in data.items() if value is not None and name not in names)
        unknown = [name for name in given if (cls, name) not in request.ignored]
        if not unknown:
            return data
        if len(request.ignored) + len(unknown) > MOST_OF_ONE_REQUEST:
            raise _refused(unknown[0], f"the request has more than {MOST_OF_ONE_REQUEST} unknown fields")
        known = {name: text for name, text in names.items() if not text.startswith(WITHOUT_EFFECT)}
        for name in unknown:
            advice = cls.elsewhere.get(name) or _advice(name, known, strict=request.server.strict)
            if advice is not None:
                raise _refused(name, advice)
        request.ignore(cls, unknown)
        return data


@cache
def _descriptions(kind: type[Body]) -> Mapping[str, str]:
    """Of its fields, by their names in a request. Once for a class: a body may have thousands of its objects."""
    return {field.alias or name: field.description or "" for name, field in kind.model_fields.items()}


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
        annotation: Any = self.body_field.field_info.annotation if self.body_field is not None else object
        model = TypeAdapter(annotation)

        async def handle(request: Request) -> Response:
            REQUEST.set(OfOneRequest(request.app.state.service.unknown))
            return await handler(JsonRequest(request, model))

        return handle


class JsonRequest(Request):
    """A request whose JSON becomes the route's model off the event loop, since a large body takes a while. FastAPI
    validates on the event loop; it then finds an instance and has nothing to do."""

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
        errors = [{**one, "loc": ("body", *one["loc"])} for one in error.errors(include_url=False)]
        message, param = explain(errors, value)
        raise Refusal(400, message, param=param) from None
