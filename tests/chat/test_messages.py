"""Messages as clients send them become those that the published templates need."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepgguf.chat.messages import normalize_messages
from stepgguf.chat.template import ChatTemplate
from stepgguf.demo import CHECKPOINT

TEMPLATE = ChatTemplate((CHECKPOINT / "chat_template.jinja").read_text())


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
        [user([{"type": "text", "text": " Fix this: "}, {"type": "text", "text": "\n    x = 1\n"}])],
        "<|im_start|>user\nFix this: \n\n    x = 1<|im_end|>\n<|im_start|>assistant\n<think>\n",
    ),
    "parts around an image": (
        [user([{"type": "text", "text": " a "}, {"type": "image"}, {"type": "text", "text": " b "}])],
        "<|im_start|>user\na <im_patch> b<|im_end|>\n<|im_start|>assistant\n<think>\n",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_messages_as_clients_send_them(case: str) -> None:
    messages, text = CASES[case]
    assert TEMPLATE.render(normalize_messages(messages)) == text


@pytest.mark.parametrize("role", ["system", "developer"])
def test_claude_codes_billing_line_is_in_no_system_text(role: str) -> None:
    line = "x-anthropic-billing-header: cc_version=2.1.37.0d9; cc_entrypoint=cli; cch=fa690;"
    told = [{"role": role, "content": content} for content in (f"{line}\nYou help.", line)]
    parts = [{"role": role, "content": [{"type": "text", "text": text} for text in (line, "You help.")]}]
    assert normalize_messages(told) == [{"role": "system", "content": "You help."}]
    assert normalize_messages(parts) == [{"role": "system", "content": "You help."}]
    asked = [{"role": "user", "content": line}]
    assert normalize_messages(asked) == asked, "what the user says is the user's"


def test_reasoning_in_two_spellings_is_never_joined() -> None:
    (message,) = normalize_messages([{"role": "assistant", "content": "x", "reasoning": "r", "reasoning_content": "r"}])
    assert message == {"role": "assistant", "content": "x", "reasoning_content": "r"}


@pytest.mark.parametrize("arguments", ["not json", "[1]", "7"])
def test_arguments_that_are_no_object_are_kept_as_text(arguments: str) -> None:
    call = {"function": {"name": "f", "arguments": arguments}}
    (message,) = normalize_messages([{"role": "assistant", "tool_calls": [call]}])
    assert message["tool_calls"][0]["function"]["arguments"] == {"arguments": arguments}


@given(st.lists(st.text(" \n\tab", max_size=6), min_size=1, max_size=4))
def test_text_parts_keep_their_inner_white_space_and_stand_on_lines_of_their_own(texts: list[str]) -> None:
    (message,) = normalize_messages([user([{"type": "text", "text": text} for text in texts])])
    assert message["content"] == "\n".join(texts).strip()


def test_arguments_that_nest_too_deep_to_be_read_are_a_text() -> None:
    arguments = "[" * 100_000
    message = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
    (read,) = normalize_messages([message])
    assert read["tool_calls"][0]["function"]["arguments"] == {"arguments": arguments}
