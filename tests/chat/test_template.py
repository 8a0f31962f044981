"""The embedded model's chat template speaks the published protocol, byte for byte; the sandbox holds."""

from __future__ import annotations

import ast
import json
import re
import resource
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from stepgguf.chat.renderer import MEMORY, PROCESSOR_SECONDS
from stepgguf.chat.template import ChatTemplate, normalize, place_of
from stepgguf.demo import CHECKPOINT
from stepgguf.errors import BadMetadata, TemplateRefused

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
    assert TEMPLATE.render(normalize(messages)) == text


@pytest.mark.parametrize("role", ["system", "developer"])
def test_claude_codes_billing_line_is_in_no_system_text(role: str) -> None:
    line = "x-anthropic-billing-header: cc_version=2.1.37.0d9; cc_entrypoint=cli; cch=fa690;"
    told = [{"role": role, "content": content} for content in (f"{line}\nYou help.", line)]
    parts = [{"role": role, "content": [{"type": "text", "text": text} for text in (line, "You help.")]}]
    assert normalize(told) == [{"role": "system", "content": "You help."}]
    assert normalize(parts) == [{"role": "system", "content": "You help."}]
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


@given(st.lists(st.text(" \n\tab", max_size=6), min_size=1, max_size=4))
def test_text_parts_keep_their_inner_white_space_and_stand_on_lines_of_their_own(texts: list[str]) -> None:
    (message,) = normalize([user([{"type": "text", "text": text} for text in texts])])
    assert message["content"] == "\n".join(texts).strip()


# transformers' conventions -------------------------------------------------------------------------------------------

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


@pytest.mark.parametrize(
    "source", [*CONVENTIONS, (CHECKPOINT / "chat_template.jinja").read_text()], ids=lambda s: s[:30]
)
def test_templates_are_rendered_as_transformers_does(source: str) -> None:
    messages = [{"role": "system", "content": "é <b>"}, user("a"), {"role": "assistant", "content": "b"}, user("c")]
    tools = [{"type": "function", "function": {"name": "f", "description": "ü", "parameters": {}}}]
    (expected,), _ = render_jinja_template(
        [messages], tools=tools, chat_template=source, add_generation_prompt=True, bos_token="<s>"
    )
    found = ChatTemplate(source, bos_token="<s>").render(messages, tools=tools)
    assert found == expected.replace("\x00", "")


# what a template cannot do -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'a': 1}) }}",
        "{% for _ in range(10**9) %}x{% endfor %}",
        "{{ raise_exception('no') }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_a_template_reaches_nothing_outside(source: str) -> None:
    with pytest.raises(TemplateRefused, match="the chat template cannot render") as refused:
        ChatTemplate(source).render([{"role": "user"}])
    assert refused.value.param == "messages"


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages | nope }}",
        "{% if %}",
        "{{ " + "(" * 300 + "1" + ")" * 300 + " }}",
        "{{ 10**5000 }}",  # jinja2 computes constants when it compiles
        "{{ 'a' * 10**9 }}",
    ],
    ids=lambda source: source[:20],
)
def test_a_template_that_does_not_compile_is_refused(source: str) -> None:
    with pytest.raises(BadMetadata, match="the chat template does not compile"):
        ChatTemplate(source)


HOSTILE = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "power": "{{ (messages | length + 9) ** (10**9) }}",
    "digits": "{{ (messages | length + 9) ** 5000 }}",
    "times": "{{ messages[0].role * 10**9 }}",
    "format": "{{ '%999999999d' % (messages | length) }}",
    "filter": "{{ 'a' | center(10**10) }}",
    "doubling": "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "nesting": "{% set n = namespace(x=1) %}{% for i in range(99) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "macro": "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
    "output": "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_ends_and_the_next_rendering_works(name: str) -> None:
    template = ChatTemplate("{% if messages[0].content == 'go' %}" + HOSTILE[name] + "{% endif %}fine")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    with pytest.raises(TemplateRefused, match="the chat template cannot render these messages: "):
        template.render([user("go")])
    assert template.render([user("no")]) == "fine"
    del template  # ends its process
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert spent.ru_utime - used.ru_utime < 2 * PROCESSOR_SECONDS  # the second process has its own
    assert spent.ru_maxrss << 10 <= MEMORY


def test_messages_that_nest_too_deep_are_refused() -> None:
    deep: Any = "x"
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(TemplateRefused, match="nest too deep"):
        TEMPLATE.render([user(deep)])
    assert TEMPLATE.render([user("x")])


def test_an_interrupted_rendering_does_not_answer_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    template = ChatTemplate("{{ messages[0].content }}")
    assert template._process is not None
    assert template._process.stdout is not None

    def interrupt() -> bytes:
        raise KeyboardInterrupt

    stdout = template._process.stdout
    monkeypatch.setattr(template._process, "stdout", SimpleNamespace(readline=interrupt, close=stdout.close))
    with pytest.raises(KeyboardInterrupt):
        template.render([user("one")])
    assert template.render([user("two")]) == "two"


# the probe -----------------------------------------------------------------------------------------------------------


def test_the_probe_tells_where_prompts_end() -> None:
    source = (CHECKPOINT / "chat_template.jinja").read_text()
    assert place_of(TEMPLATE.probe()) == "reasoning"
    assert place_of(ChatTemplate(source.replace("~ '<think>\\n'", "")).probe()) == "start"
    assert (
        place_of(ChatTemplate(source.replace("~ '<think>\\n'", "~ '<think>\\n\\n</think>\\n\\n'")).probe()) == "answer"
    )


@pytest.mark.parametrize("source", ["hello", "{{ messages | length }}", "{{ messages[-1].content }}"])
def test_the_probe_refuses_what_leaves_messages_out(source: str) -> None:
    with pytest.raises(BadMetadata, match="does not use `messages`"):
        ChatTemplate(source).probe()


def test_arguments_that_nest_too_deep_to_be_read_are_a_text() -> None:
    arguments = "[" * 100_000
    message = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
    (read,) = normalize([message])
    assert read["tool_calls"][0]["function"]["arguments"] == {"arguments": arguments}
