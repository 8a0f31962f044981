"""Functions as clients of every dialect declare them, and as tools of the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from pydantic import Field

from stepgguf.chat.request import Tool
from stepgguf.errors import RequestError
from stepgguf.server.body.objects import CheckedObject, ignored


class FunctionDeclaration(CheckedObject):
    """`parameters` is a JSON schema; a function without takes nothing."""

    name: str = Field(pattern=r"^[^<>\s]{1,128}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: object = ignored("arguments are always kept to their schema")
    cache_control: object = ignored("every prefix is found without marks")
    defer_loading: object = ignored("the model sees all tools")
    allowed_callers: object = ignored("the model is the one caller")
    input_examples: object = ignored("the chat template shows no examples")
    eager_input_streaming: object = ignored("arguments are always sent as they come")


def as_tools(functions: Sequence[FunctionDeclaration]) -> tuple[Tool, ...]:
    """Return the functions as tools of the model. RequestError: two functions have one name."""
    for name, n in Counter(function.name for function in functions).items():
        if n > 1:
            raise RequestError(f"tools: two functions are called {name}", param="tools")
    return tuple(Tool(f.name, f.description, f.parameters or {}) for f in functions)
