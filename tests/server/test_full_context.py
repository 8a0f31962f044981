"""A prompt that does not fit, in the words by which each client knows it. They are part of the protocol: a client that
does not know them gives up, one that does makes the conversation shorter and goes on."""

from __future__ import annotations

import re
from typing import Any

import pytest

from stepgguf.errors import ContextLengthExceeded
from tests.server.conftest import Server

LONG = "long " * 5000
MESSAGES = [{"role": "user", "content": LONG}]
# Expressions of clients, as their releases of November 2026 have them.
KNOWN_BY = {
    "litellm": r"(?i)this model's maximum context length is",
    "litellm, of llama.cpp": r"(?i)exceeds the available context size",
    "LangChain": r"context_length_exceeded|Input tokens exceed the configured limit|prompt is too long",
    "pi, opencode": r"(?i)maximum context length is \d+ tokens",
    "Cline": r"(?i)\bcontext\s*(?:length|window)\b",
    "opencode's GitLab provider": r"tokens(?s:.*)maximum|maximum(?s:.*)tokens",
    "clients of llama-server": r"exceed_context_size_error",
    "both numbers": r"max.*?(\d+) tokens.*?(\d+) ",
}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/chat/completions", {"messages": MESSAGES}, "messages"),
        ("/v1/chat/completions", {"messages": MESSAGES, "stream": True}, "messages"),
        ("/v1/completions", {"prompt": LONG}, "prompt"),
        ("/v1/responses", {"input": LONG}, "input"),
    ],
)
def test_openais_clients_recognise_it(server: Server, path: str, body: dict[str, Any], param: str) -> None:
    response = server.client.post(path, json=body)
    error = response.json()["error"]
    assert response.status_code == 400
    assert (error["type"], error["code"], error["param"]) == (
        "invalid_request_error",
        "context_length_exceeded",
        param,
    )
    assert error["n_ctx"] == 4096
    assert error["n_prompt_tokens"] > 4096
    said = f"This model's maximum context length is 4096 tokens. However, your {param} resulted in "
    assert error["message"].startswith(f"{said}{error['n_prompt_tokens']} tokens")
    for client, expression in KNOWN_BY.items():
        assert re.search(expression, error["message"]), client


@pytest.mark.parametrize("streamed", [False, True])
def test_anthropics_clients_recognise_it(server: Server, streamed: bool) -> None:
    body = {"messages": MESSAGES, "max_tokens": 9, "stream": streamed}
    response = server.client.post("/v1/messages", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["type"]) == (400, "invalid_request_error")
    found = re.match(r"prompt is too long: (\d+) tokens > (\d+) maximum", error["message"])
    assert found is not None
    assert int(found[1]) > int(found[2]) == 4096


def test_a_larger_context_is_advised_only_where_there_is_one() -> None:
    assert ContextLengthExceeded(100, 64, 4096).hint == (
        "Start with a larger --ctx (the model knows up to 4096) or a new chat."
    )
    for error in (ContextLengthExceeded(5000, 64, 4096), ContextLengthExceeded(4096, 4096, 4096)):
        assert "--ctx" not in str(error.hint)
        assert "4096" in str(error.hint)
    assert "--ctx" in str(ContextLengthExceeded(100, 64).hint)


def test_more_tokens_than_the_context_has_left_may_be_asked_for(server: Server) -> None:
    """llama-server takes such requests too, and Claude Code asks for 32,000."""
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 32_000, "temperature": 0}
    assert server.client.post("/v1/messages", json=body).status_code == 200
    assert server.client.post("/v1/chat/completions", json=body).status_code == 200
