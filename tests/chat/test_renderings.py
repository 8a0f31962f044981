"""What templates make of a conversation, byte for byte: the published protocol, and transformers' own renderings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from stepgguf.chat.renderer import template_environment
from stepgguf.chat.template import ChatTemplate
from stepgguf.demo import CHECKPOINT

EMBEDDED = (CHECKPOINT / "chat_template.jinja").read_text()
LATER = (Path(__file__).parent.parent / "data" / "step-3.7-features.jinja").read_text()


def by_transformers(source: str, messages: list[dict[str, Any]], **variables: Any) -> str:
    variables = {"add_generation_prompt": True, "bos_token": "", **variables}
    (text,), _ = render_jinja_template([messages], chat_template=source, **variables)
    return str(text)


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str, reasoning: str | None = None, *calls: dict[str, Any]) -> dict[str, Any]:
    given = {"content": content, "reasoning_content": reasoning, "tool_calls": [*calls] or None}
    return {"role": "assistant"} | {name: value for name, value in given.items() if value is not None}


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def turns(*texts: str, answer: str = "<|im_start|>assistant\n<think>\n") -> str:
    return "".join(f"<|im_start|>{text}<|im_end|>\n" for text in texts) + answer


SYSTEM = {"role": "system", "content": "Be terse."}
TOOL = {"type": "function", "function": {"name": "get_weather", "description": "Wetter für <Ort>", "parameters": {}}}
TOOL_TEXT = (
    '{"type": "function", "function": {"name": "get_weather", "description": "Wetter für <Ort>", "parameters": {}}}'
)
RULES = (
    "If you choose to call a function ONLY reply in the following format with NO suffix:\n\n<tool_call>\n"
    "<function=example_function_name>\n<parameter=example_parameter_1>\nvalue_1\n</parameter>\n"
    "<parameter=example_parameter_2>\nThis is the value for the second parameter\nthat can span\nmultiple lines\n"
    "</parameter>\n</function>\n</tool_call>\n\n<IMPORTANT>\nReminder:\n- Function calls MUST follow the specified "
    "format: an inner <function=...>\n...\n</function> block must be nested within <tool_call>\n...\n</tool_call> "
    "XML tags\n- Required parameters MUST be specified\n</IMPORTANT>"
)
INTRODUCTION = "# Tools\n\nYou have access to the following functions in JSONSchema format:"
TOOLS = f"{INTRODUCTION}\n\n<tools>\n{TOOL_TEXT}\n</tools>\n\n{RULES}"
RESPONSE = "<tool_response>\nseen\n</tool_response>"

PROTOCOL: dict[str, tuple[list[dict[str, Any]], dict[str, Any], str]] = {  # messages, variables, prompt
    "a question": ([user("Hi")], {}, turns("user\nHi")),
    "a system message": ([SYSTEM, user("Hi")], {}, turns("system\nBe terse.", "user\nHi")),
    "no generation prompt": ([user("Hi")], {"add_generation_prompt": False}, turns("user\nHi", answer="")),
    "a token in front": ([user("Hi")], {"bos_token": "<s>"}, "<s>" + turns("user\nHi")),
    "tools after the system message": (
        [SYSTEM, user("Hi")], {"tools": [TOOL]}, turns(f"system\nBe terse.\n\n{TOOLS}", "user\nHi")
    ),
    "tools alone": ([user("Hi")], {"tools": [TOOL]}, turns(f"system\n{TOOLS}", "user\nHi")),
    "reasoning before the last question is left out": (
        [user("a"), assistant("b", "old"), user("c"), assistant("d", "new")],
        {},
        turns("user\na", "assistant\nb", "user\nc", "assistant\n<think>\nnew\n</think>\nd"),
    ),
    "after it the tags are there even without reasoning": (
        [user("a"), assistant("b")], {}, turns("user\na", "assistant\n<think>\n\n</think>\nb")
    ),
    "reasoning inside of the content": (
        [user("a"), assistant("<think>\nold\n</think>\n\nb"), user("c"), assistant("<think>\nnew\n</think>\nd")],
        {},
        turns("user\na", "assistant\nb", "user\nc", "assistant\n<think>\nnew\n</think>\nd"),
    ),
    "a user turn that is a tool's response is no question": (
        [user("a"), assistant("b", "kept"), user(RESPONSE)],
        {},
        turns("user\na", "assistant\n<think>\nkept\n</think>\nb", f"user\n{RESPONSE}"),
    ),
    "calls follow each other, their results share a turn": (
        [user("a"), assistant("", "r", call("f", x="1", y=[1, {"ü": None}]), call("g")),
         {"role": "tool", "content": "one"}, {"role": "tool", "content": "two"}],
        {},
        turns(
            "user\na",
            "assistant\n<think>\nr\n</think>\n<tool_call>\n<function=f>\n<parameter=x>\n1\n</parameter>\n<parameter=y>\n"
            '[1, {"ü": null}]\n</parameter>\n</function>\n</tool_call>'
            "<tool_call>\n<function=g>\n</function>\n</tool_call>",
            "tool_response\n<tool_response>one</tool_response><tool_response>two</tool_response>",
        ),
    ),
    "values that are no text, list or object": (
        [user("a"), assistant("", "", call("f", b=True, n=None, i=2, d=0.5))],
        {},
        turns(
            "user\na",
            "assistant\n<think>\n\n</think>\n<tool_call>\n<function=f>\n<parameter=b>\nTrue\n</parameter>\n<parameter=n>\n"
            "None\n</parameter>\n<parameter=i>\n2\n</parameter>\n<parameter=d>\n0.5\n</parameter>\n</function>\n</tool_call>",
        ),
    ),
    "system messages in the middle": (
        [user("a"), SYSTEM, {"role": "system", "name": "observation", "content": "o"}, user("b")],
        {},
        turns("user\na", "system\nBe terse.", "observation\no", "user\nb"),
    ),
    "parts": (
        [user([{"type": "text", "text": " a "}, {"type": "image"}, {"type": "text", "value": "b"}])],
        {},
        turns("user\n a <im_patch>b"),
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", PROTOCOL)
def test_the_embedded_template_speaks_the_published_protocol(case: str) -> None:
    messages, variables, prompt = PROTOCOL[case]
    rest = {name: value for name, value in variables.items() if name != "bos_token"}
    assert ChatTemplate(EMBEDDED, bos_token=variables.get("bos_token", "")).render(messages, **rest) == prompt
    assert by_transformers(EMBEDDED, messages, **variables) == prompt


LATER_CASES: dict[str, tuple[list[dict[str, Any]], dict[str, Any], str]] = {
    "no effort, no turn": ([user("Hi")], {}, turns("user\nHi")),
    "low": ([user("Hi")], {"reasoning_effort": "low"}, turns("system\nReasoning: low\n\n", "user\nHi")),
    "high, before the system message": (
        [SYSTEM, user("Hi")], {"reasoning_effort": "high"}, turns("system\nReasoning: high\n\nBe terse.", "user\nHi")
    ),
    "text parts are joined by a space": (
        [user([*({"type": "text", "text": text} for text in "ab"), {"type": "image"}, {"type": "text", "text": "c"}])],
        {},
        turns("user\na b<im_patch>c"),
    ),
    "arguments as an object": (
        [assistant("", None, call("f", x=["é"], y="z"))],
        {},
        turns(
            'assistant\n<tool_call>\n<function=f>\n<parameter=x>\n["é"]\n</parameter>\n<parameter=y>\nz\n</parameter>\n'
            "</function>\n</tool_call>"
        ),
    ),
}  # fmt: skip


def rendered_here(source: str, messages: list[dict[str, Any]], **variables: Any) -> str:
    """The renderer in this process: it takes any variable, where ChatTemplate passes on what a request has."""
    variables = {"add_generation_prompt": True, "bos_token": "", **variables}
    return template_environment().from_string(source).render(messages=messages, **variables)


@pytest.mark.parametrize("case", LATER_CASES)
def test_what_a_later_template_adds_is_rendered_as_transformers_does(case: str) -> None:
    messages, variables, prompt = LATER_CASES[case]
    assert rendered_here(LATER, messages, **variables) == prompt
    assert by_transformers(LATER, messages, **variables) == prompt
    if not variables:
        assert ChatTemplate(LATER).render(messages) == prompt


def test_arguments_as_json_text_are_read_where_transformers_has_no_filter() -> None:
    as_text = {"type": "function", "function": {"name": "f", "arguments": '{"x": ["é"], "y": "z"}'}}
    messages, variables, prompt = LATER_CASES["arguments as an object"]
    assert messages[0]["tool_calls"] != [as_text]
    assert ChatTemplate(LATER).render([{**messages[0], "tool_calls": [as_text]}], **variables) == prompt


CONVENTIONS = [
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.content }}{% break %}{% endfor %}",
    "{% for m in messages %}{{ m | tojson }}{{ m | tojson(indent=2) }}{{ m | tojson(sort_keys=true) }}{% endfor %}",
    "{{ messages[0] | tojson(ensure_ascii=true) }}{{ messages | tojson(separators=(',', ':')) }}",
    "{{ strftime_now('%Y-%m-%d') }} {% if tools %}{{ tools[0].function.name }}{% endif %}{{ undefined_thing }}",
    "  {% if add_generation_prompt %}\n    {% set x = 1 %}\n  a{{ x }}\n  {% endif %}\n{{ bos_token }}b\n",
    "{% set ns = namespace(x=0) %}{% for m in messages | reverse %}{% set ns.x = loop.index0 %}{% endfor %}{{ ns.x }}",
    "{% generation %}{% set x = 1 %}{% endgeneration %}{{ x }}",
]


@pytest.mark.slow
@pytest.mark.parametrize("source", [*CONVENTIONS, EMBEDDED, LATER], ids=lambda source: source[:30])
def test_templates_are_rendered_as_transformers_does(source: str) -> None:
    messages = [{"role": "system", "content": "é <b>"}, user("a"), {"role": "assistant", "content": "b"}, user("c")]
    tools = [{"type": "function", "function": {"name": "f", "description": "ü", "parameters": {}}}]
    expected = by_transformers(source, messages, tools=tools, bos_token="<s>")
    assert ChatTemplate(source, bos_token="<s>").render(messages, tools=tools) == expected.replace("\x00", "")
