"""The embedded model's chat template speaks the published protocol, byte for byte; the sandbox holds."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest

from stepgguf.chat.template import ChatTemplate, normalize
from stepgguf.demo import CHECKPOINT
from stepgguf.errors import BadMetadata

TEMPLATE = ChatTemplate((CHECKPOINT / "chat_template.jinja").read_text())
# Renderings of the published templates, made with jinja2. Where they are at hand, all cases of 3.5 are compared.
GOLDENS = Path(__file__).parents[3] / "shared" / "templates" / "Step-3.7-Flash.render-goldens.txt"


def goldens() -> list[Any]:
    if not GOLDENS.exists():
        return []
    cases = []
    for case in GOLDENS.read_text().split("\n=== ")[1:]:
        arguments = json.loads(re.search(r"--- args: (.*)", case)[1])  # type: ignore[index]
        if "reasoning_effort" not in arguments:  # 3.7 only
            text = ast.literal_eval(case.strip().splitlines()[-1])
            cases.append(pytest.param(arguments, text, id=case.splitlines()[0].replace(" ", "-")))
    return cases


@pytest.mark.skipif(not GOLDENS.exists(), reason="the published renderings are not in the repository")
@pytest.mark.parametrize(("arguments", "text"), goldens())
def test_renders_as_the_published_template_does(arguments: dict[str, Any], text: str) -> None:
    assert TEMPLATE.render(**arguments) == text


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": "x\\ny", "n": 2, "l": [1]}'}}
CASES: dict[str, tuple[list[dict[str, Any]], str]] = {
    "question": ([user("Hi")], "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n"),
    "old reasoning goes": (
        [user("a"), {"role": "assistant", "content": "b", "reasoning_content": "r"}, user("c")],
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n",
    ),
    "string arguments, reasoning kept between calls": (
        [user("a"), {"role": "assistant", "content": None, "reasoning": " r ", "tool_calls": [CALL]},
         {"role": "tool", "content": "1\n"}, {"role": "tool", "content": "2"}],
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n<think>\nr\n</think>\n<tool_call>\n<function=f>\n"
        "<parameter=a>\nx\ny\n</parameter>\n<parameter=n>\n2\n</parameter>\n<parameter=l>\n[1]\n</parameter>\n"
        "</function>\n</tool_call><|im_end|>\n<|im_start|>tool_response\n<tool_response>1</tool_response>"
        "<tool_response>2</tool_response><|im_end|>\n<|im_start|>assistant\n<think>\n",
    ),
    "parts and whitespace": (
        [user([{"type": "text", "text": " a "}, {"type": "text", "text": "b"}])],
        "<|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\n<think>\n",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_messages_as_clients_send_them(case: str) -> None:
    messages, text = CASES[case]
    assert TEMPLATE.render(normalize(messages)) == text


@pytest.mark.parametrize("role", ["system", "developer"])
def test_claude_codes_billing_line_is_in_no_system_text(role: str) -> None:
    line = "x-anthropic-billing-header: cc_version=2.1.37.0d9; cc_entrypoint=cli; cch=fa690;"
    told = [{"role": role, "content": content} for content in (f"{line}\nYou help.", line)]
    parts = [{"role": role, "content": [{"type": "text", "text": text} for text in (line, "You help.")]}]
    assert normalize(told) == [{"role": "system", "content": "You help."}]
    assert [part["text"] for part in normalize(parts)[0]["content"]] == ["", "You help."]
    asked = [{"role": "user", "content": line}]
    assert normalize(asked) == asked, "what the user says is the user's"


def test_reasoning_in_two_spellings_is_never_joined() -> None:
    (message,) = normalize([{"role": "assistant", "content": "x", "reasoning": "r", "reasoning_content": "r"}])
    assert message == {"role": "assistant", "content": "x", "reasoning_content": "r"}


@pytest.mark.parametrize("arguments", ["not json", "[1]", "7"])
def test_arguments_that_are_no_object_are_kept_as_text(arguments: str) -> None:
    call = {"function": {"name": "f", "arguments": arguments}}
    (message,) = normalize([{"role": "assistant", "tool_calls": [call]}])
    assert message["tool_calls"][0]["function"]["arguments"] == {"arguments": arguments}


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'a': 1}) }}",
        "{% for _ in range(10**9) %}x{% endfor %}",
        "{{ raise_exception('no') }}",
        "{{ messages | nope }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_a_template_reaches_nothing_outside(source: str) -> None:
    with pytest.raises(BadMetadata, match="chat template"):
        ChatTemplate(source).render([{"role": "user"}])
