"""Messages as clients send them, made into those that the published templates need.

Clients spell the same thing in many ways: contents as texts or as lists of parts, arguments as JSON text or as objects,
reasoning under four names. A template knows one of each.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

ChatMessage = Mapping[str, Any]  # OpenAI's: role, content, reasoning_content, tool_calls, tool_call_id

# Claude Code puts this line before its system prompt. It changes with every request, so with it no request would find
# its prefix in the cache; it says nothing to a model.
_BILLING_LINE = "x-anthropic-billing-header:"


def normalize_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Return the messages as the published templates need them.

    Contents and reasoning are trimmed: stray whitespace in the history drives this model into reasoning loops
    (llama.cpp issue 24181). Text parts that follow each other are one text, with a line break in between. Tool
    arguments given as a JSON string, as OpenAI clients send them back, become a mapping, because the 3.5 template
    iterates over its items. Old reasoning may come as `reasoning_content`, `reasoning`, `reasoning_details` or inside
    <think> in the content; the first that says something counts, they are never joined. The role `developer` is
    `system` to this model. Claude Code's billing line is left out of it, whatever dialect it came in.
    """
    result = []
    for message in messages:
        item = {key: value for key, value in message.items() if key not in ("reasoning", "reasoning_details")}
        if item.get("role") == "developer":
            item["role"] = "system"
        content = item.get("content")
        if isinstance(content, str):
            item["content"] = content.strip()
        elif isinstance(content, list):
            item["content"] = _join_parts(content)
        else:
            item["content"] = ""
        if item.get("role") == "system":
            item["content"] = _without_billing_line(item["content"])
            if content and not item["content"]:  # it said nothing else
                continue
        if item.get("role") == "assistant":
            _separate_reasoning(item, message)
        if item.get("tool_calls"):
            item["tool_calls"] = [_with_parsed_arguments(call) for call in item["tool_calls"]]
        result.append(item)
    return result


def _without_billing_line(content: str | list[Any]) -> str | list[Any]:
    if isinstance(content, str):
        return "\n".join(line for line in content.split("\n") if not line.startswith(_BILLING_LINE)).strip()
    return [{**part, "text": _without_billing_line(part["text"])} if _is_text(part) else part for part in content]


def _separate_reasoning(item: dict[str, Any], message: ChatMessage) -> None:
    """Put the reasoning of an assistant's message into reasoning_content, and only there."""
    inline = ""
    if isinstance(item["content"], str) and "</think>" in item["content"] and item["content"].startswith("<think>"):
        inline, _, item["content"] = item["content"].removeprefix("<think>").partition("</think>")
        item["content"] = item["content"].strip()
    details = message.get("reasoning_details")
    texts = [d.get("text") for d in details if isinstance(d, Mapping)] if isinstance(details, list) else []
    detailed = "".join(text for text in texts if isinstance(text, str))
    spellings = (message.get("reasoning_content"), message.get("reasoning"), detailed, inline)
    item.pop("reasoning_content", None)
    reasoning = next((s.strip() for s in spellings if isinstance(s, str) and s.strip()), None)
    if reasoning is not None:
        item["reasoning_content"] = reasoning


def _join_parts(parts: Sequence[Any]) -> str | list[Any]:
    """The parts of a content: one text if that is all, trimmed at its outer ends only."""
    joined: list[Any] = []
    for is_text, run in groupby(parts, _is_text):
        same = list(run)
        joined += [{"type": "text", "text": "\n".join(part["text"] for part in same)}] if is_text else same
    if joined and _is_text(joined[0]):
        joined[0]["text"] = joined[0]["text"].lstrip()
    if joined and _is_text(joined[-1]):
        joined[-1]["text"] = joined[-1]["text"].rstrip()
    return joined[0]["text"] if len(joined) == 1 and _is_text(joined[0]) else joined


def _is_text(part: object) -> bool:
    return isinstance(part, Mapping) and isinstance(part.get("text"), str)


def _with_parsed_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    """A tool call whose arguments are a mapping; what is none stays readable under the name `arguments`."""
    function = dict(call.get("function", call))
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            function["arguments"] = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            function["arguments"] = None
    if not isinstance(function.get("arguments"), Mapping):
        function["arguments"] = {} if not arguments else {"arguments": arguments}
    return {**call, "function": function} if "function" in call else function
