"""opencode: Chat Completions, by a configuration in the environment that is laid over the user's own and the project's.

The user's keys, themes and sessions stay in use. Of the providers of models there is only this one: neither a login of
the user's nor a key reaches another.
"""

from __future__ import annotations

import json
from pathlib import Path

from stepgguf.agents.agent import KEY_VARIABLE, Agent, AgentSettings, longest_answer
from stepgguf.agents.model_server import ModelServer


def _configure(server: ModelServer, folder: Path) -> AgentSettings:
    model = {
        "name": server.model,
        "reasoning": True,
        "tool_call": True,
        "limit": {"context": server.n_ctx, "output": longest_answer(server)},
    }
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "name": "stepgguf",
        "options": {"baseURL": f"{server.url}/v1", "apiKey": f"{{env:{KEY_VARIABLE}}}", "timeout": False},
        "models": {server.model: model},
    }
    config = {
        "model": f"stepgguf/{server.model}",
        "small_model": f"stepgguf/{server.model}",
        "enabled_providers": ["stepgguf"],
        "provider": {"stepgguf": provider},
        "autoupdate": False,
    }
    return AgentSettings(environment={"OPENCODE_CONFIG_CONTENT": json.dumps(config), KEY_VARIABLE: server.key})


OPENCODE = Agent("opencode", "npm install -g opencode-ai", _configure)
