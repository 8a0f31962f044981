"""Every spelling of "think less", as one limit in tokens."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from stepgguf.chat.request import EFFORTS
from stepgguf.server.body.reasoning import EFFORT_SYNONYMS, ReasoningAmounts
from stepgguf.server.config import ServerConfig
from stepgguf.server.dialects.chat_completions.request import ChatBody
from tests.server.conftest import Server

pytestmark = pytest.mark.slow

CONFIG = ServerConfig(("demo",), efforts=EFFORTS)
LOW, MEDIUM = EFFORTS["low"], EFFORTS["medium"]


def limit(**fields: Any) -> int | None:
    return ChatBody.model_validate({"messages": [{"role": "user", "content": "x"}], **fields}).reasoning_limit(CONFIG)


@pytest.mark.parametrize(
    ("fields", "tokens"),
    [
        ({}, None),
        # OpenAI, Ollama, LM Studio, Groq, Mistral, xAI, DeepSeek, Fireworks (tokens, switches), LiteLLM (object)
        ({"reasoning_effort": "none"}, 0),
        ({"reasoning_effort": "minimal"}, 0),
        ({"reasoning_effort": "low"}, LOW),
        ({"reasoning_effort": "Medium"}, MEDIUM),
        ({"reasoning_effort": "max"}, None),
        ({"reasoning_effort": "default"}, None),
        ({"reasoning_effort": "disable"}, 0),
        ({"reasoning_effort": 1500}, 1500),
        ({"reasoning_effort": False}, 0),
        ({"reasoning_effort": {"effort": "low", "summary": "auto"}}, LOW),
        # OpenRouter, Together, SGLang, LM Studio
        ({"reasoning": {"effort": "low"}}, LOW),
        ({"reasoning": {"max_tokens": 100}}, 100),
        ({"reasoning": {"enabled": False}}, 0),
        ({"reasoning": {"enabled": True}}, None),
        ({"reasoning": {"enable": "no"}}, 0),
        ({"reasoning": {"reasoning_effort": "low"}}, LOW),
        ({"reasoning": "off"}, 0),
        ({"reasoning": "on"}, None),
        # Anthropic, Z.ai, DeepSeek, Moonshot, Volcengine, MiniMax, Cohere, NVIDIA
        ({"thinking": {"type": "disabled"}}, 0),
        ({"thinking": {"type": "enabled"}}, None),
        ({"thinking": {"type": "enabled", "clear_thinking": False}}, None),
        ({"thinking": {"type": "enabled", "keep": "all"}}, None),
        ({"thinking": {"type": "adaptive"}}, None),
        ({"thinking": {"type": "auto"}}, None),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, 1024),
        ({"thinking": {"type": "disabled", "budget_tokens": 1024}}, 0),
        ({"thinking": {"type": "enabled", "token_budget": 7}}, 7),
        # Gemini, behind OpenAI's dialect
        ({"thinking_config": {"thinking_budget": 0, "include_thoughts": True}}, 0),
        ({"extra_body": {"google": {"thinking_config": {"thinking_budget": 100}}}}, 100),
        ({"google": {"thinking_config": {"thinking_level": "low"}}}, LOW),
        ({"thinking": False}, 0),
        ({"thinking": "disabled"}, 0),
        ({"thinking_mode": "disabled"}, 0),
        ({"thinking_effort": "low"}, LOW),
        # Ollama
        ({"think": False}, 0),
        ({"think": "low"}, LOW),
        ({"think": True}, None),
        # DashScope, SiliconFlow, Cerebras
        ({"enable_thinking": False}, 0),
        ({"enable_thinking": "false"}, 0),
        ({"enable_thinking": True, "thinking_budget": 300}, 300),
        ({"enable_thinking": False, "thinking_budget": 300}, 0),
        ({"thinking_budget": -1}, None),
        ({"disable_reasoning": True}, 0),
        ({"disable_reasoning": False}, None),
        # llama.cpp, vLLM, NVIDIA
        ({"thinking_budget_tokens": 0}, 0),
        ({"reasoning_budget_tokens": 12}, 12),
        ({"thinking_token_budget": 12}, 12),
        ({"reasoning_budget": 12}, 12),
        ({"max_thinking_tokens": 12}, 12),
        ({"nvext": {"max_thinking_tokens": 12}}, 12),
        ({"custom_params": {"thinking_budget": 12}}, 12),
        ({"low_effort": True}, LOW),
        ({"low_effort": False}, None),
        ({"chat_template_kwargs": {"enable_thinking": False}}, 0),
        ({"chat_template_kwargs": {"thinking": False}}, 0),
        ({"chat_template_kwargs": {"reasoning_effort": "low"}}, LOW),
        ({"chat_template_kwargs": {"thinking_budget": 5}}, 5),
        ({"chat_template_kwargs": {"thinking_mode": "disabled"}}, 0),
        ({"chat_template_kwargs": {"enable_thinking": True, "preserve_thinking": True, "low_effort": True}}, LOW),
    ],
    ids=str,
)
def test_a_spelling_is_a_limit(fields: dict[str, Any], tokens: int | None) -> None:
    assert limit(**fields) == tokens


def test_every_row_of_the_table_stands_in_the_body_and_in_the_templates_arguments() -> None:
    for name in ReasoningAmounts.model_fields.keys() - {"chat_template_kwargs", "custom_params", "google"}:
        value = {"disable_reasoning": True, "low_effort": True}.get(name, 0)
        tokens = LOW if name == "low_effort" else 0
        assert limit(**{name: value}) == limit(chat_template_kwargs={name: value}) == tokens, name


def test_of_several_the_least_counts() -> None:
    """As Dify's extended mode sends them, and as they contradict each other."""
    on = {
        "enable_thinking": True,
        "thinking": {"type": "enabled"},
        "chat_template_kwargs": {"enable_thinking": True, "thinking": True},
        "reasoning_effort": "medium",
    }
    off = {
        "enable_thinking": False,
        "thinking": {"type": "disabled"},
        "chat_template_kwargs": {"enable_thinking": False, "thinking": False},
        "reasoning_effort": "high",
    }
    assert limit(**on) == MEDIUM
    assert limit(**{**on, "thinking_budget": 100}) == 100
    assert limit(**off) == 0
    for name, value in off.items():
        if name != "reasoning_effort":
            assert limit(**{**on, name: value}) == 0


def test_every_word_means_an_effort() -> None:
    for word, effort in EFFORT_SYNONYMS.items():
        assert limit(reasoning_effort=word) == limit(think=word.upper()) == EFFORTS[effort]


@pytest.mark.parametrize("value", ["hihg", -2, [], {"efort": "low"}, {"effort": "lo"}, {"max_tokens": "many"}], ids=str)
def test_what_says_nothing_is_refused(value: Any) -> None:
    with pytest.raises(ValidationError):
        limit(reasoning_effort=value)


def test_the_responses_dialect_knows_the_same_spellings(server: Server) -> None:
    def cut(**fields: Any) -> dict[str, Any]:
        body = {"input": "How many 'r's are in the word strawberry?", "temperature": 0, "store": False, **fields}
        usage: dict[str, Any] = server.client.post("/v1/responses", json=body).json()["usage"]
        return usage

    whole = cut(max_output_tokens=-1)["output_tokens_details"]["reasoning_tokens"]
    assert whole == 41
    for fields in ({"thinking_budget": 8}, {"reasoning": {"max_tokens": 8}}, {"chat_template_kwargs": {"think": 8}}):
        assert cut(**fields)["output_tokens_details"]["reasoning_tokens"] <= 8 + 3
    for fields in ({"enable_thinking": False}, {"reasoning": {"effort": "none"}}, {"thinking": {"type": "disabled"}}):
        assert cut(max_output_tokens=8, **fields)["output_tokens_details"]["reasoning_tokens"] == 0
