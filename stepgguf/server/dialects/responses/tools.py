"""Tools as the Responses dialect declares them, and as functions that the model may call.

    function    as it is
    namespace   its functions, called NAMESPACE__NAME; a call of one comes back with `namespace` and `name` apart
    custom      a function of one string; a call of it comes back as custom_tool_call, with that string as `input`
    any other   runs at OpenAI (web_search, code_interpreter, mcp, ...), or is newer than this server: it is left out

A custom tool's grammar (format) is shown to the model and does not bind it: it is in Lark, which no engine here reads.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from stepgguf.chat.request import Tool, ToolChoice
from stepgguf.errors import RequestError
from stepgguf.server.body.objects import RequestObject
from stepgguf.server.dialects.function_tools import FunctionDeclaration

LONGEST_NAME = 128  # characters, as the pattern of a function's name allows
MOST_ALLOWED = 1024  # tools in a list of allowed ones, each of which is looked up
INPUT = "input"  # what a custom tool's one parameter is called
_OPENING = re.compile(r'\{\s*"(?:[^"\\]|\\.)*"\s*:\s*"')  # from { to the quotation mark that opens the value
_WHOLE = re.compile(r'(?:[^"\\]+|\\u[0-9a-fA-F]{4}|\\[^u])*')  # no half of an escape


class ResponsesFunctionTool(FunctionDeclaration):
    """In chat completions the function is an object of its own."""

    type: Literal["function"]
    strict: bool | None = None


class ResponsesGrammarFormat(RequestObject):
    type: Literal["text", "grammar"]
    syntax: str | None = None
    definition: str | None = None


class ResponsesCustomTool(RequestObject):
    """A tool that takes free text. To the model it is a function of one string."""

    type: Literal["custom"]
    name: str = Field(pattern=r"^[^<>\s]{1,128}$")
    description: str | None = None
    format: ResponsesGrammarFormat | None = None

    @property
    def parameters(self) -> dict[str, Any]:
        description = "Free text."
        if self.format is not None and self.format.definition:
            description = f"Text that keeps to this {self.format.syntax or ''} grammar:\n{self.format.definition}"
        schema = {"type": "string", "description": description}
        return {"type": "object", "properties": {INPUT: schema}, "required": [INPUT], "additionalProperties": False}


class ResponsesOtherTool(RequestObject):
    """It runs at OpenAI, or it is newer than this server."""

    type: str


def by_type(*known: str) -> Discriminator:
    """Return the discriminator of a union whose members are tagged with their types, and "other" for what is of no
    known type."""

    def tag(tool: Any) -> str:  # pydantic also asks for the tag of what is an instance already
        kind = tool.get("type") if isinstance(tool, dict) else getattr(tool, "type", None)
        return kind if kind in known else "other"

    return Discriminator(tag)


_Own = Annotated[ResponsesFunctionTool, Tag("function")] | Annotated[ResponsesCustomTool, Tag("custom")]
_Other = Annotated[ResponsesOtherTool, Tag("other")]


class ResponsesNamespaceTool(RequestObject):
    """Tools under a common name, usually those of one MCP server."""

    type: Literal["namespace"]
    name: str
    description: str | None = None
    tools: list[Annotated[_Own | _Other, by_type("function", "custom")]]


ResponsesTool = Annotated[
    _Own | Annotated[ResponsesNamespaceTool, Tag("namespace")] | _Other, by_type("function", "custom", "namespace")
]


def echoed_tools(tools: Iterable[ResponsesTool]) -> list[dict[str, Any]]:
    """Return the tools as the response repeats them: those that are offered, with the fields that have a meaning
    here."""
    found = []
    for tool in tools:
        if isinstance(tool, ResponsesNamespaceTool):
            found.append({**tool.model_dump(), "tools": echoed_tools(tool.tools)})
        elif not isinstance(tool, ResponsesOtherTool):
            found.append(tool.model_dump())
    return found


@dataclass(frozen=True, slots=True)
class Offer:
    """A tool that the model may call under `tool.name`, and how the client knows it."""

    tool: Tool
    name: str
    namespace: str | None = None
    custom: bool = False


class Offers:
    """What is offered in one request. left_out: the types of the tools that are not. RequestError: two tools of one
    namespace, or of none, have one name."""

    def __init__(self, declared: Sequence[ResponsesTool]) -> None:
        self._by_key: dict[tuple[str | None, str], Offer] = {}
        self.by_name: dict[str, Offer] = {}
        self.left_out: list[str] = []
        self._n_taken: Counter[str] = Counter()
        alone = [(None, tool) for tool in declared]
        inside = [
            (space.name, tool)
            for space in declared
            if isinstance(space, ResponsesNamespaceTool)
            for tool in space.tools
        ]
        for namespace, tool in (*alone, *inside):  # a namespace's tools make way for the others
            if isinstance(tool, ResponsesOtherTool):
                self.left_out.append(tool.type)
            elif not isinstance(tool, ResponsesNamespaceTool):
                self._add(namespace, tool)

    @property
    def tools(self) -> tuple[Tool, ...]:
        return tuple(offer.tool for offer in self.by_name.values())

    def model_name(self, namespace: str | None, name: str) -> str:
        """Return what the model calls a tool, offered or not."""
        offer = self._by_key.get((namespace or None, name))
        return flat_name(namespace, name) if offer is None else offer.tool.name

    def restricted_to(self, keys: Iterable[tuple[str | None, str]]) -> Offers:
        """Return the same offers without the tools that are not named. keys: namespace and name."""
        kept = Offers(())
        kept._by_key = {key: self._by_key[key] for key in keys if key in self._by_key}
        kept.by_name = {offer.tool.name: offer for offer in kept._by_key.values()}
        return kept

    def __contains__(self, key: tuple[str | None, str]) -> bool:
        return key in self._by_key

    def _add(self, namespace: str | None, tool: ResponsesFunctionTool | ResponsesCustomTool) -> None:
        key = (namespace, tool.name)
        if key in self._by_key:
            where = f" in the namespace {namespace!r}" if namespace else ""
            raise RequestError(f"tools: two functions{where} are called {tool.name}", param="tools")
        name = self._free_name(flat_name(namespace, tool.name))
        shown = Tool(name, tool.description, tool.parameters or {})
        self._by_key[key] = self.by_name[name] = Offer(
            shown, tool.name, namespace, isinstance(tool, ResponsesCustomTool)
        )

    def _free_name(self, flat: str) -> str:
        """Return the flat name, or one with a number if it is taken: `a` may have `b__c` where `a__b` has `c`, or two
        long names were cut to the same."""
        name = flat
        while name in self.by_name:
            self._n_taken[flat] += 1
            name = f"{flat[: LONGEST_NAME - 8]}_{self._n_taken[flat] + 1}"
        return name


def flat_name(namespace: str | None, name: str) -> str:
    """Return NAMESPACE__NAME, as agents called the tools of MCP servers before there were namespaces."""
    if not namespace:
        return name
    separator = "" if namespace.endswith("__") else "__"
    return re.sub(r"[<>\s]", "_", f"{namespace}{separator}{name}")[:LONGEST_NAME]


class InputReader:
    """Reads the one string of a custom tool's call out of fragments of its arguments' JSON."""

    def __init__(self) -> None:
        self._inside = False
        self._rest = ""

    @property
    def is_complete(self) -> bool:
        """Whether the JSON has come to its end."""
        return self._rest.endswith("}")

    def feed(self, fragment: str) -> str:
        """Return what this fragment adds to the string; "" while it cannot be said, as in the middle of an escape."""
        self._rest += fragment
        if not self._inside:
            opening = _OPENING.match(self._rest)
            if opening is None:
                return ""
            self._inside, self._rest = True, self._rest[opening.end() :]
        whole = _WHOLE.match(self._rest)
        assert whole is not None
        self._rest = self._rest[whole.end() :]
        text: str = json.loads(f'"{whole[0]}"', strict=False)
        return text


# which of them ----------------------------------------------------------------------------------------------------


class ResponsesNamedTool(RequestObject):
    type: Literal["function", "custom"]
    name: str
    namespace: str | None = None


class ResponsesAllowedTool(RequestObject):
    """A tool that may be called. One that runs elsewhere has no name."""

    type: str
    name: str | None = None
    namespace: str | None = None


class ResponsesAllowedTools(RequestObject):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[ResponsesAllowedTool] = Field(max_length=MOST_ALLOWED)


class ResponsesOtherChoice(RequestObject):
    type: str


_Named = Annotated[ResponsesNamedTool, Tag("function")] | Annotated[ResponsesNamedTool, Tag("custom")]
ResponsesToolChoice = (
    Literal["auto", "none", "required"]
    | Annotated[
        _Named | Annotated[ResponsesAllowedTools, Tag("allowed_tools")] | Annotated[ResponsesOtherChoice, Tag("other")],
        by_type("function", "custom", "allowed_tools"),
    ]
)


def resolve_choice(choice: ResponsesToolChoice | None, offers: Offers) -> tuple[ToolChoice, Offers]:
    """Return what the model must call, and what it may call. RequestError: it must call what is not offered."""
    if choice is None or isinstance(choice, str):
        chosen = ToolChoice(choice or "auto")
    elif isinstance(choice, ResponsesAllowedTools):
        offers = offers.restricted_to((tool.namespace or None, tool.name) for tool in choice.tools if tool.name)
        chosen = ToolChoice(choice.mode)
    elif isinstance(choice, ResponsesNamedTool):
        if (choice.namespace or None, choice.name) not in offers:
            raise _not_offered(f"the tool {choice.name[:LONGEST_NAME]!r}")
        chosen = ToolChoice("required", offers.model_name(choice.namespace, choice.name))
    else:
        raise _not_offered(f"a tool of type {choice.type[:LONGEST_NAME]!r}")
    if chosen.mode == "required" and not offers.by_name:
        raise _not_offered("a tool")
    return chosen, offers


def _not_offered(what: str) -> RequestError:
    return RequestError(
        f"tool_choice asks for {what}, which is not offered",
        param="tool_choice",
        hint="Offer it in `tools`. Tools that run at OpenAI are not here.",
    )
