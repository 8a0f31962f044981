"""Chat templates: messages in, prompt text out, with the template that the model file carries.

A template is code from a file that somebody else wrote, so it runs in jinja2's immutable sandbox: no attribute that
starts with an underscore, no method that changes its object. Rendering follows transformers' conventions
(trim_blocks, lstrip_blocks, tojson without ASCII escapes), which the published templates rely on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from stepgguf.errors import BadMetadata

Message = Mapping[str, Any]
# Claude Code puts this line before its system prompt. It changes with every request, so with it no request would find
# its prefix in the cache; it says nothing to a model.
_BILLING_LINE = re.compile(r"^[ \t]*x-anthropic-billing-header:[^\n]*\n*", re.MULTILINE)


class ChatTemplate:
    """A compiled template. `source` is jinja2 text; a syntax error is BadMetadata."""

    def __init__(self, source: str, *, bos_token: str = "") -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.Undefined)
        environment.filters["tojson"] = _to_json
        environment.filters["fromjson"] = json.loads
        environment.globals["raise_exception"] = _raise
        self._bos_token = bos_token
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise BadMetadata(
                f"the chat template does not compile: {error}",
                hint="Replace it with `stepgguf template FILE.gguf NEW.jinja`.",
            ) from error

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The prompt text. What the template itself refuses (raise_exception, sandbox) is BadMetadata."""
        try:
            return self._template.render(
                messages=messages, tools=tools, add_generation_prompt=add_generation_prompt, bos_token=self._bos_token
            )
        except (jinja2.TemplateError, ArithmeticError, LookupError, RecursionError, TypeError, ValueError) as error:
            raise BadMetadata(f"the chat template cannot render these messages: {error}") from error


def normalize(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as the published templates need them.

    Contents and reasoning are trimmed: stray whitespace in the history drives this model into reasoning loops
    (llama.cpp issue 24181). Tool arguments given as a JSON string, as OpenAI clients send them back, become a
    mapping, because the 3.5 template iterates over its items. Old reasoning may come as `reasoning_content`,
    `reasoning`, `reasoning_details` or inside <think> in the content; the first that says something counts, they are
    never joined. The role `developer` is `system` to this model. Claude Code's billing line is left out of it, whatever
    dialect it came in.
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
            item["content"] = [_trimmed(part) for part in content]
        else:
            item["content"] = ""
        if item.get("role") == "system":
            item["content"] = _without_billing(item["content"])
            if content and not item["content"]:
                continue
        if item.get("role") == "assistant":
            _separate_reasoning(item, message)
        if item.get("tool_calls"):
            item["tool_calls"] = [_parsed(call) for call in item["tool_calls"]]
        result.append(item)
    return result


def _without_billing(content: str | list[Any]) -> str | list[Any]:
    if isinstance(content, str):
        return _BILLING_LINE.sub("", content).strip()
    return [
        {**part, "text": _without_billing(part["text"])}
        if isinstance(part, Mapping) and isinstance(part.get("text"), str)
        else part
        for part in content
    ]


def _separate_reasoning(item: dict[str, Any], message: Message) -> None:
    """Put the reasoning of an assistant's message into reasoning_content, and only there."""
    inline = ""
    if isinstance(item["content"], str) and "</think>" in item["content"] and item["content"].startswith("<think>"):
        inline, _, item["content"] = item["content"].removeprefix("<think>").partition("</think>")
        item["content"] = item["content"].strip()
    details = message.get("reasoning_details")
    texts = [d.get("text") for d in details if isinstance(d, Mapping)] if isinstance(details, list) else []
    told = "".join(text for text in texts if isinstance(text, str))
    spellings = (message.get("reasoning_content"), message.get("reasoning"), told, inline)
    item.pop("reasoning_content", None)
    reasoning = next((s.strip() for s in spellings if isinstance(s, str) and s.strip()), None)
    if reasoning is not None:
        item["reasoning_content"] = reasoning


def _trimmed(part: Any) -> Any:
    if isinstance(part, Mapping) and isinstance(part.get("text"), str):
        return {**part, "text": part["text"].strip()}
    return part


def _parsed(call: Mapping[str, Any]) -> dict[str, Any]:
    function = dict(call.get("function", call))
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            function["arguments"] = json.loads(arguments or "{}")
        except ValueError:
            function["arguments"] = None
    if not isinstance(function.get("arguments"), Mapping):
        function["arguments"] = {} if not arguments else {"arguments": arguments}
    return {**call, "function": function} if "function" in call else function


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
