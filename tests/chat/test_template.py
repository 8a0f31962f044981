"""A chat template is code that somebody else wrote: its process holds it, and a probe says what it does."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from typing import Any

import pytest

from stepgguf.chat.renderer import MEMORY, PROCESSOR_SECONDS
from stepgguf.chat.template import ChatTemplate, prompt_ending
from stepgguf.demo import CHECKPOINT
from stepgguf.errors import BadMetadata, TemplateRefused

EMBEDDED = (CHECKPOINT / "chat_template.jinja").read_text()
TEMPLATE = ChatTemplate(EMBEDDED)


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


# what a template cannot do -------------------------------------------------------------------------------------------


@pytest.mark.slow
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


@pytest.mark.slow
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


# In a process of its own, whose only children are the template's: they alone are what is measured.
RENDER = """
import json, resource, sys
from stepgguf.chat.template import ChatTemplate
from stepgguf.errors import TemplateRefused
template, refused = ChatTemplate(sys.argv[1]), None
try:
    template.render([{"role": "user", "content": "go"}])
except TemplateRefused as error:
    refused = str(error)
fine = template.render([{"role": "user", "content": "no"}])
del template  # ends its process
spent = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([refused, fine, spent.ru_utime, spent.ru_maxrss << 10]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_ends_and_the_next_rendering_works(name: str) -> None:
    source = "{% if messages[0].content == 'go' %}" + HOSTILE[name] + "{% endif %}fine"
    result = subprocess.run([sys.executable, "-c", RENDER, source], capture_output=True, text=True, check=True)
    refused, fine, seconds, memory = json.loads(result.stdout)
    assert "the chat template cannot render these messages: " in refused
    assert fine == "fine"
    assert seconds < 2 * PROCESSOR_SECONDS  # the second process has its own
    assert memory <= MEMORY


def test_messages_that_nest_too_deep_are_refused() -> None:
    deep: Any = "x"
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(TemplateRefused, match="nest too deep"):
        TEMPLATE.render([user(deep)])
    assert TEMPLATE.render([user("x")])


def test_an_interrupted_rendering_does_not_answer_the_next_one() -> None:
    loops = "{% for _ in range(99999) %}{% for _ in range(99) %}{% endfor %}{% endfor %}"
    template = ChatTemplate("{% if messages[0].content == 'one' %}" + loops + "{% endif %}{{ messages[0].content }}")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        with pytest.raises(KeyboardInterrupt):
            template.render([user("one")])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert template.render([user("two")]) == "two"


# the probe -----------------------------------------------------------------------------------------------------------


def test_the_probe_tells_where_prompts_end() -> None:
    source = (CHECKPOINT / "chat_template.jinja").read_text()
    assert prompt_ending(TEMPLATE.probe()) == "reasoning"
    assert prompt_ending(ChatTemplate(source.replace("~ '<think>\\n'", "")).probe()) == "start"
    assert (
        prompt_ending(ChatTemplate(source.replace("~ '<think>\\n'", "~ '<think>\\n\\n</think>\\n\\n'")).probe())
        == "answer"
    )


@pytest.mark.parametrize("source", ["hello", "{{ messages | length }}", "{{ messages[-1].content }}"])
def test_the_probe_refuses_what_leaves_messages_out(source: str) -> None:
    with pytest.raises(BadMetadata, match="does not use `messages`"):
        ChatTemplate(source).probe()
