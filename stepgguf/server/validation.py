"""A body that does not fit its schema: pydantic's errors as one sentence for whoever sent it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from json import JSONEncoder
from typing import Any

SHOWN = 60  # characters of a wrong value that are shown


def describe_errors(errors: Sequence[Mapping[str, Any]], body: object) -> tuple[str, str | None]:
    """Return pydantic's errors as one sentence, and the path of the field.

    Of the alternatives of a union the one that went furthest into the body is what was meant.
    """
    # Every alternative of a union has its own errors, so the list is long and mostly beside the point.
    paths = [_path_in_body(error["loc"], error["type"], body) for error in errors]
    deepest = max(paths, key=len)
    error = errors[paths.index(deepest)]
    if error["type"] == "unknown_field":
        field = _path_text((*deepest, error["ctx"]["field"]))
        return f"{field}: {error['msg']}", field
    field = _path_text(deepest)
    if error["type"] == "missing":
        return f"{field or 'the body'} is missing", field or None
    expected = dict.fromkeys(_expectation(e["msg"]) for e, path in zip(errors, paths, strict=True) if path == deepest)
    either = " or ".join(expected).replace(" or expected ", " or ")
    message = f"{field or 'the body'}: {either}, found {_start_of_value(error.get('input'))}"
    return message, field or None


def _path_in_body(loc: Sequence[str | int], error_type: str, body: object) -> tuple[str | int, ...]:
    """Return the parts of pydantic's location that are in the body; the others name alternatives of unions. error_type:
    in pydantic's words."""
    if loc[0] != "body":  # query, path
        return tuple(loc[1:])
    path: list[str | int] = []
    for part in loc[1:]:
        inside = isinstance(part, int) and part < len(body) if isinstance(body, list) else False
        if inside or (isinstance(body, Mapping) and part in body):
            body = body[part]  # type: ignore[index]
            path.append(part)
        elif error_type == "missing" and part is loc[-1]:
            path.append(part)
    return tuple(path)


def _path_text(path: Sequence[str | int]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def _expectation(message: str) -> str:
    message = message.removeprefix("Value error, ")
    return message.replace("Input should be", "expected", 1) if message.startswith("Input should be") else message


def _start_of_value(value: object) -> str:
    """Return the start of a value as JSON. No more of it is written than that: it may be megabytes."""
    text = ""
    for piece in JSONEncoder(ensure_ascii=False, default=repr).iterencode(value):
        text += piece
        if len(text) > SHOWN:
            return text[: SHOWN - 3] + "..."
    return text
