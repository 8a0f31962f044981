"""Request bodies: models that accept what they know and name what they do not.

A field is honoured, or it is `ignored` with the reason, or unknown_fields.py says what becomes of it. Null means
absent, as clients send it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from inspect import get_annotations
from typing import Any, ClassVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError

from stepgguf.server.body.unknown_fields import (
    LONGEST_NAME,
    MOST_OF_ONE_REQUEST,
    REQUEST,
    RequestUnknowns,
    namesake,
    near_miss,
)

WITHOUT_EFFECT = "Accepted, without effect"
FIRST = ("model", "messages", "input")


def _fail_fast(schema: Any) -> None:
    """Make every list of a schema stop at its first wrong item, as pydantic's FailFast does for one list."""
    if isinstance(schema, dict):
        if schema.get("type") == "list":
            schema["fail_fast"] = True
        schema = list(schema.values())
    if isinstance(schema, list):
        for part in schema:
            _fail_fast(part)


class RequestObject(BaseModel):
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


class CheckedObject(RequestObject):
    """An object whose unknown fields are looked at; see unknown_fields.py. `elsewhere`: fields that are refused because
    their meaning would be lost, and what to use instead."""

    elsewhere: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """The fields in the order of their use, as /docs shows them: FIRST, what is needed, the class's own, those
        of its bases, last what has no effect."""
        described = handler(schema)
        found = handler.resolve_ref_schema(described)
        fields, needed = cls.model_fields, found.get("required", ())
        declared = [name for base in cls.__mro__ for name in get_annotations(base) if name in fields]
        names = [fields[name].alias or name for name in declared]

        def rank(item: tuple[str, JsonSchemaValue]) -> tuple[bool, bool, bool, int]:
            name, description = item[0], item[1].get("description", "")
            return description.startswith(WITHOUT_EFFECT), name not in FIRST, name not in needed, names.index(name)

        found["properties"] = dict(sorted(found.get("properties", {}).items(), key=rank))
        return described

    @model_validator(mode="before")
    @classmethod
    def _knows_its_fields(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        names, request = (
            _field_descriptions(cls),
            REQUEST.get(RequestUnknowns()),
        )  # a test may validate without a request
        # What this request has had ignored in another object of the class is not looked at again.
        given = (name for name, value in data.items() if value is not None and name not in names)
        unknown = [name for name in given if (cls, name) not in request.ignored]
        if not unknown:
            return data
        if len(request.ignored) + len(unknown) > MOST_OF_ONE_REQUEST:
            raise _unknown_field(unknown[0], f"the request has more than {MOST_OF_ONE_REQUEST} unknown fields")
        # Nobody is told that he meant a field which has no effect.
        known = {name: text for name, text in names.items() if not text.startswith(WITHOUT_EFFECT)}
        for name in unknown:
            advice = cls.elsewhere.get(name) or _advice_on(name, known, strict=request.server.strict)
            if advice is not None:
                raise _unknown_field(name, advice)
        request.ignore(cls, unknown)
        return data


@cache
def _field_descriptions(owner: type[CheckedObject]) -> Mapping[str, str]:
    """The descriptions of a class's fields, by their names in a request. Gathered once for a class: a body may have
    thousands of its objects."""
    return {field.alias or name: field.description or "" for name, field in owner.model_fields.items()}


def _advice_on(name: str, known: Mapping[str, str], *, strict: bool) -> str | None:
    """Return what to say to whoever sends this field; None if it is to be ignored. known: the known fields and their
    descriptions."""
    if (near := near_miss(name, known)) is not None:
        return f"unknown field; did you mean {near}?"
    if (other := namesake(name, known)) is not None:
        return f"unknown field; here it is {other}. {known[other]}".rstrip()
    return "unknown field, and this server is strict" if strict else None


def _unknown_field(field: str, advice: str) -> PydanticCustomError:
    return PydanticCustomError("unknown_field", "{advice}", {"field": field[:LONGEST_NAME], "advice": advice})


def ignored(reason: str) -> Any:
    """Return a field that is accepted without effect, for this reason."""
    return Field(None, description=f"{WITHOUT_EFFECT}: {reason}.", exclude=True)
