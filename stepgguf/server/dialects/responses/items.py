"""A conversation in items, as the Responses dialect has it, and in messages, as the chat template has it.

    message                    system, developer, user; the assistant's own
    reasoning                  reasoning_content of the assistant's message that follows
    *_call                     tool_calls of the assistant's message
    *_call_output, *_output    a message of role tool

Items that follow one another and are the assistant's make one message; reasoning starts the next one. The history may
hold items of tools that run elsewhere, or that are newer than this server: a call with a result is shown as the call of
a function, whatever its type; what else there is is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, Tag, TypeAdapter, WrapValidator
from pydantic_core.core_schema import ValidatorFunctionWrapHandler

from stepgguf.server.body.objects import RequestObject
from stepgguf.server.body.unreadable import (
    AnyPart,
    TextPart,
    as_parts,
    as_shown_text,
    as_tool_output,
    newest_user_message,
    paragraphs,
    refuse_unreadable,
)
from stepgguf.server.dialects.responses.tools import INPUT, Offers, by_type
from stepgguf.server.dialects.sealed_reasoning import unseal

Json = dict[str, Any]
RESULT_FIELDS = ("output", "outputs", "results")  # where an item that is a call and its result has the result


Content = Annotated[list[AnyPart], BeforeValidator(as_parts)]


class ResponsesMessage(RequestObject):
    type: Literal["message"]
    role: Literal["system", "developer", "user", "assistant"]
    content: Content = Field(default_factory=list)


class ReasoningItem(RequestObject):
    """summary: what another model's provider gives instead of the reasoning."""

    type: Literal["reasoning"]
    content: Content = Field(default_factory=list)
    encrypted_content: str | None = None
    summary: Content = Field(default_factory=list)

    @property
    def text(self) -> str:
        return _joined_text(self.content) or unseal(self.encrypted_content or "") or _joined_text(self.summary)


class ResponsesFunctionCall(RequestObject):
    type: Literal["function_call"]
    call_id: str
    name: str
    namespace: str | None = None
    arguments: Any = None


class ResponsesCustomCall(RequestObject):
    type: Literal["custom_tool_call"]
    call_id: str
    name: str
    namespace: str | None = None
    input: str

    @property
    def arguments(self) -> Json:
        return {INPUT: self.input}


class ResponsesCallOutput(RequestObject):
    type: Literal["function_call_output", "custom_tool_call_output"]
    call_id: str
    output: Annotated[list[TextPart], BeforeValidator(as_tool_output)] = Field(default_factory=list)


class ItemReference(RequestObject):
    """An item of an answer that this server keeps, by its id."""

    type: Literal["item_reference"]
    id: str


class OtherItem(RequestObject):
    model_config = ConfigDict(extra="allow")
    type: str


Own = ResponsesMessage | ReasoningItem | ResponsesFunctionCall | ResponsesCustomCall | ResponsesCallOutput
Item = Own | ItemReference | OtherItem


def _with_type(item: Any) -> Any:
    """Return an item with its type, which may be left out of messages and of references."""
    if not isinstance(item, dict) or item.get("type") is not None:
        return item
    return {**item, "type": "message" if "role" in item else "item_reference"}


def _as_sent(value: Any, validate: ValidatorFunctionWrapHandler) -> list[Json]:
    """Return the items as they were sent, once they have been validated: references are replaced before the items are
    read, and answers are kept with the items as they came."""
    items = [{"type": "message", "role": "user", "content": value}] if isinstance(value, str) else value
    items = [_with_type(item) for item in items] if isinstance(items, list) else items
    validate(items)  # for its errors; the items themselves stay as they were sent
    return items


_CALLS = ("function_call", "function_call_output", "custom_tool_call", "custom_tool_call_output")
_Tagged = (
    Annotated[ResponsesMessage, Tag("message")]
    | Annotated[ReasoningItem, Tag("reasoning")]
    | Annotated[ResponsesFunctionCall, Tag("function_call")]
    | Annotated[ResponsesCustomCall, Tag("custom_tool_call")]
    | Annotated[ResponsesCallOutput, Tag("function_call_output")]
    | Annotated[ResponsesCallOutput, Tag("custom_tool_call_output")]
    | Annotated[ItemReference, Tag("item_reference")]
    | Annotated[OtherItem, Tag("other")]
)
_List = list[Annotated[_Tagged, by_type("message", "reasoning", *_CALLS, "item_reference")]]
Items = Annotated[Annotated[_List, Field(min_length=1)], WrapValidator(_as_sent)]
_adapter: TypeAdapter[list[Item]] = TypeAdapter(_List)


def parse_items(items: Sequence[Json]) -> list[Item]:
    """Return the items of a request that `Items` has checked, parsed."""
    return _adapter.validate_python(items)


def left_out_types(items: Iterable[Item]) -> list[str]:
    """Return the types of the items that the model is shown nothing of."""
    return [item.type for item in items if isinstance(item, OtherItem) and not any(_as_call(item))]


def refuse_unreadable_input(items: Sequence[Item], n_before: int) -> None:
    """Raise RequestError if the newest message of the user has what the model cannot read.

    n_before: how many items come from answers that are kept, and are not in the body.
    """
    index = newest_user_message([_role_of(item) for item in items])
    if index is not None and index >= n_before:
        message = items[index]
        assert isinstance(message, ResponsesMessage)
        refuse_unreadable(message.content, f"input[{index - n_before}].content")


def as_chat_messages(items: Iterable[Item], offers: Offers) -> list[Json]:
    """Return the items as OpenAI's chat messages. Calls have the names under which the tools are offered now."""
    messages: list[Json] = []
    turn: Json | None = None  # the assistant's, while it goes on
    for item in _shown_to_the_model(items):
        if isinstance(item, ResponsesCallOutput) or (isinstance(item, ResponsesMessage) and item.role != "assistant"):
            messages.append(_other_message(item))
            turn = None
            continue
        # Reasoning after text or calls begins a new answer of the model's: its template has reasoning first.
        if turn is None or (isinstance(item, ReasoningItem) and (turn["content"] or turn["tool_calls"])):
            turn = {"role": "assistant", "content": "", "reasoning_content": "", "tool_calls": []}
            messages.append(turn)
        _add_to_turn(turn, item, offers)
    return messages


def _joined_text(parts: Iterable[TextPart]) -> str:
    return paragraphs(part.text for part in parts)


def _shown_to_the_model(items: Iterable[Item]) -> Iterator[Own]:
    for item in items:
        if isinstance(item, OtherItem):
            yield from _as_call(item)
        elif not isinstance(item, ItemReference):
            yield item


def _role_of(item: Item) -> str:
    if isinstance(item, ResponsesMessage):
        return item.role
    return "tool" if item.type.endswith("_output") else "assistant"


def _as_call(item: OtherItem) -> Iterator[ResponsesFunctionCall | ResponsesCallOutput]:
    """Yield the item as the call of a function, its result, or both; nothing, if it is no call, or one of which nothing
    came."""
    fields = {name: value for name, value in (item.model_extra or {}).items() if value is not None}
    call_id = fields.get("call_id", fields.get("id"))
    results = [fields[name] for name in RESULT_FIELDS if fields.get(name)]
    rest: Json = {
        name: value for name, value in fields.items() if name not in ("id", "call_id", "name", "status", *RESULT_FIELDS)
    }
    if isinstance(call_id, str) and item.type.endswith("_output"):
        yield _call_output(call_id, results[0] if results else rest)
    elif isinstance(call_id, str) and item.type.endswith("_call") and ("call_id" in fields or results):
        name, arguments = fields.get("name", item.type.removesuffix("_call")), fields.get("arguments", rest)
        yield ResponsesFunctionCall(
            type="function_call", call_id=call_id, name=str(name), arguments=_as_arguments(arguments)
        )
        if results:
            yield _call_output(call_id, as_shown_text(results[0]))


def _call_output(call_id: str, output: Any) -> ResponsesCallOutput:
    return ResponsesCallOutput(type="function_call_output", call_id=call_id, output=as_tool_output(output))


def _as_arguments(value: Any) -> str | Json:
    return value if isinstance(value, str | dict) else {"arguments": value}


def _other_message(item: ResponsesMessage | ResponsesCallOutput) -> Json:
    if isinstance(item, ResponsesMessage):
        return {"role": item.role, "content": _joined_text(item.content)}
    return {"role": "tool", "tool_call_id": item.call_id, "content": _joined_text(item.output)}


def _add_to_turn(
    turn: Json, item: ResponsesMessage | ReasoningItem | ResponsesFunctionCall | ResponsesCustomCall, offers: Offers
) -> None:
    if isinstance(item, ReasoningItem):
        turn["reasoning_content"] += item.text
    elif isinstance(item, ResponsesMessage):
        turn["content"] = paragraphs((turn["content"], _joined_text(item.content)))
    else:
        function = {"name": offers.model_name(item.namespace, item.name), "arguments": item.arguments or {}}
        turn["tool_calls"].append({"id": item.call_id, "type": "function", "function": function})
