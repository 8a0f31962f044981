"""From a request to an engine's, and back: reasoning that somebody else closes, and answers that are cut."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stepgguf.chat.exchange import ChatModel, PreparedRequest, Reply
from stepgguf.chat.request import ChatRequest, Tool, ToolChoice
from stepgguf.chat.template import CLOSING_WORDS
from stepgguf.convert.rewrite import read_chat_template, replace_chat_template
from stepgguf.runtime.engine import Finished, FinishReason, Sampling, Step, Stream, Timings, Tokens
from stepgguf.runtime.llama import LlamaEngine, LlamaOptions

WEATHER = Tool("get_weather", "Get the weather", {"properties": {"city": {"type": "string"}}, "required": ["city"]})
TRIP = Tool(
    "plan_trip",
    "Plan a trip",
    {
        "properties": {
            "city": {"type": "string", "enum": ["Paris", "Rome"]},
            "days": {"type": "integer", "minimum": 1, "maximum": 9},
            "by": {"type": "array", "items": {"enum": ["bus", "train"]}, "minItems": 1, "maxItems": 2},
        },
        "required": ["city", "days", "by"],
    },
)
QUESTION = {"role": "user", "content": "What is the weather in Paris?"}


@pytest.fixture(scope="module")
def chat(demo_gguf: Path) -> Iterator[ChatModel]:
    with LlamaEngine(demo_gguf, LlamaOptions(n_ctx=2048, threads=1)) as engine:
        yield ChatModel(engine)


def request(content: str = "How many 'r's are in the word strawberry?", **fields: Any) -> ChatRequest:
    return ChatRequest([{"role": "user", "content": content}], fields.pop("sampling", Sampling(0.0)), **fields)


def steps(chat: ChatModel, prepared: PreparedRequest) -> tuple[Step, ...]:
    return tuple(s for e in Stream(chat.engine, prepared.request) if isinstance(e, Tokens) for s in e.steps)


# reasoning -----------------------------------------------------------------------------------------------------------


def test_a_reasoning_that_is_cut_ends_with_the_closing_words(chat: ChatModel) -> None:
    tokens = chat.prepare(request(reasoning_budget=0)).request
    text = b"".join(map(chat.engine.piece, tokens.prompt)).decode()
    assert text.endswith(f"<|im_start|>assistant\n<think>\n{CLOSING_WORDS}\n</think>\n")
    assert tokens.reasoning is None
    cut = chat.prepare(request(reasoning_budget=9)).request.reasoning
    assert cut is not None
    assert b"".join(map(chat.engine.piece, cut.closing)).decode() == f"\n\n{CLOSING_WORDS}\n</think>\n"
    own = ChatModel(chat.engine, closing_message="Enough.").prepare(request(reasoning_budget=9)).request.reasoning
    assert own is not None
    assert b"".join(map(chat.engine.piece, own.closing)).decode() == "\n\nEnough.\n</think>\n"


@pytest.mark.slow
@pytest.mark.parametrize("budget", [0, 1, 4, 15])
def test_what_opens_and_closes_reasoning_is_no_text_after_a_cut(chat: ChatModel, budget: int) -> None:
    markers = {chat.markers.start_of_reasoning, chat.markers.end_of_reasoning}
    for seed in range(6):
        prepared = chat.prepare(request(sampling=Sampling(seed=seed), reasoning_budget=budget, max_tokens=80))
        made = steps(chat, prepared)
        assert sum(step.token_id in markers for step in made) == (budget > 0)
        assert all(step.forced for step in made if step.token_id in markers)


def test_the_closing_words_and_an_answer_find_room_in_max_tokens(chat: ChatModel) -> None:
    cut = chat.prepare(request(reasoning_budget=9)).request.reasoning
    assert cut is not None
    n_closing = len(cut.closing)
    reasoning = chat.prepare(request(reasoning_budget=1000, max_tokens=100)).request.reasoning
    assert reasoning is not None
    assert reasoning.budget == 100 - 25 - n_closing
    assert chat.prepare(request(reasoning_budget=5, max_tokens=100)).request.reasoning.budget == 5  # type: ignore[union-attr]
    assert chat.prepare(request(reasoning_budget=1000, max_tokens=n_closing)).request.reasoning is None
    assert chat.prepare(request(max_tokens=n_closing)).request.reasoning.budget is None  # type: ignore[union-attr]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ending", "place"), [("", "start"), ("<think>", "reasoning"), ("<think>\\n\\n</think>\\n\\n", "answer")]
)
def test_a_template_may_leave_the_reasoning_to_the_model_or_close_it(
    demo_gguf: Path, tmp_path: Path, ending: str, place: str
) -> None:
    path = Path(shutil.copy(demo_gguf, tmp_path))
    opening = "open('assistant') ~ '{}'"
    template = read_chat_template(path).replace(opening.format("<think>\\n"), opening.format(ending))
    replace_chat_template(path, template)
    with LlamaEngine(path, LlamaOptions(n_ctx=1024, threads=1)) as engine:
        chat = ChatModel(engine)
        assert chat.render_prompt(request())[1] == place
        prepared = chat.prepare(request())
        assert prepared.in_reasoning == (place == "reasoning")
        reasoning = prepared.request.reasoning
        assert (reasoning is None) == (place == "answer")
        assert reasoning is None or reasoning.opening == (chat.markers.start_of_reasoning if place == "start" else None)
        none, now = chat.render_prompt(request(reasoning_budget=0))
        assert now == "answer"
        text = b"".join(map(engine.piece, none)).decode()
        assert text.count("<think>") == text.count("</think>") == 1


# calls that are cut --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("reason", ["length", "cancelled", "error"])
@pytest.mark.parametrize("budget", [None, 0])
@pytest.mark.parametrize(
    ("tools", "choice"),
    [
        ((WEATHER,), ToolChoice("auto")),
        ((WEATHER, TRIP), ToolChoice("required")),
        ((WEATHER, TRIP), ToolChoice("required", "plan_trip")),
    ],
    ids=["auto", "required", "named"],
)
def test_a_call_cut_after_any_token_cannot_be_taken_for_whole(
    chat: ChatModel, tools: tuple[Tool, ...], choice: ToolChoice, budget: int | None, reason: FinishReason
) -> None:
    asked = ChatRequest([QUESTION], Sampling(0.0), tools, choice, reasoning_budget=budget, max_tokens=300)
    prepared = chat.prepare(asked)
    made = steps(chat, prepared)
    ids = [step.token_id for step in made]
    assert chat.markers.end_of_call in ids
    for n in range(1, ids.index(chat.markers.end_of_call) + 2):
        reply = Reply(prepared)
        deltas = reply.feed(Tokens(made[:n])) + reply.feed(Finished(reason, Timings()))
        arguments = "".join(delta.text for delta in deltas if delta.kind == "arguments")
        assert not any(delta.kind == "text" for delta in deltas)
        if any(delta.kind == "call" for delta in deltas) and ids[n - 1] != chat.markers.end_of_call:
            assert reply.cut_call == 0
            assert reply.finish_reason == ("error" if reason == "error" else "length")
            assert arguments.startswith("{")
            with pytest.raises(json.JSONDecodeError):
                json.loads(arguments)
        else:
            assert reply.cut_call is None
            assert arguments == "" or json.loads(arguments)["city"]
