"""Writes fields.md: every field of every request, from the types that check them.

python docs/write_fields.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from stepgguf.server.body.objects import WITHOUT_EFFECT, CheckedObject
from stepgguf.server.body.sampling import Effort
from stepgguf.server.dialects.chat_completions.request import ChatBody
from stepgguf.server.dialects.completions.request import CompletionBody
from stepgguf.server.dialects.messages.request import MessagesBody
from stepgguf.server.dialects.responses.request import ResponsesBody

PAGE = Path(__file__).with_name("fields.md")
BODIES: dict[str, type[CheckedObject]] = {
    "/v1/chat/completions": ChatBody,
    "/v1/completions": CompletionBody,
    "/v1/responses": ResponsesBody,
    "/v1/messages": MessagesBody,
}
HEAD = """# Every field of every request

This page is written from the types by which the server checks requests (`python docs/write_fields.py`). A field that is
not here is ignored, with a line in the log; if its name is close to one that is here, the request is refused, and the
error says what was probably meant. `null` is the same as leaving a field out. Fields without effect are accepted
because clients send them, and the reason for each is said.

An *effort* is one of `none`, `minimal`, `low`, `medium`, `high`, `xhigh`, `max`. It says how much the model may think:
`none` and `minimal` not at all, `low` and `medium` as many tokens as `--effort-low` and `--effort-medium` of
`stepgguf serve` say, and from `high` on without a limit.
"""


def page() -> str:
    """The page as Markdown."""
    return "\n".join([HEAD, *(line for route, body in BODIES.items() for line in _section(route, body))])


def _section(route: str, body: type[CheckedObject]) -> Iterator[str]:
    schema = body.model_json_schema()
    needed = schema.get("required", ())
    fields = schema["properties"].items()
    yield from (f"## `POST {route}`", "", "| field | takes | what it does |", "|---|---|---|")
    without_effect: dict[str, list[str]] = {}
    for name, field in fields:
        text = field.get("description", "")
        if text.startswith(WITHOUT_EFFECT):
            reason = text.removeprefix(WITHOUT_EFFECT).removeprefix(": ").rstrip(".")
            without_effect.setdefault(reason, []).append(f"`{name}`")
        else:
            required = "Required. " if name in needed else ""
            yield f"| `{name}` | {_takes(field, schema)} | {_cell(required + text)} |"
    yield ""
    if without_effect:
        yield from ("Accepted without effect:", "")
        for reason, names in without_effect.items():
            yield f"- {', '.join(names)}: {reason}."
        yield ""


def _takes(field: dict[str, Any], schema: dict[str, Any]) -> str:
    return " or ".join(dict.fromkeys(_words(field, schema))) or "anything"


def _words(field: dict[str, Any], schema: dict[str, Any]) -> Iterator[str]:
    """The kinds of value that a field takes, null left out."""
    if "$ref" in field:
        field = schema["$defs"][field["$ref"].rpartition("/")[2]]
    for part in field.get("anyOf", field.get("oneOf", ())):
        yield from _words(part, schema)
    if field.get("enum") == list(get_args(Effort)):
        yield "an effort"
    elif "enum" in field or "const" in field:
        yield ", ".join(f"`{_cell(json.dumps(value))}`" for value in field.get("enum", [field.get("const")]))
    elif field.get("type") == "array":
        yield "a list"
    elif "type" in field and field["type"] != "null":
        words = {"object": "an object", "string": "text", "boolean": "true or false", "integer": "a whole number"}
        bounds = [f"from {field['minimum']:g}" if "minimum" in field else ""]
        bounds += [f"to {field['maximum']:g}" if "maximum" in field else ""]
        yield " ".join([words.get(field["type"], "a number"), *filter(None, bounds)])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    PAGE.write_text(page())
