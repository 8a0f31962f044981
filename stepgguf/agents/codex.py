"""Codex: OpenAI's Responses, by `-c KEY=VALUE` on its command line.

So the config.toml in its own folder (CODEX_HOME) stays the program's and the user's: Codex writes into it which folders
are trusted. Told how long the context is, it makes its conversation shorter in time.
"""

from __future__ import annotations

import json
from pathlib import Path

from stepgguf.agents.agent import KEY_VARIABLE, WAIT_MS, Agent, AgentSettings
from stepgguf.agents.model_server import ModelServer


def _configure(server: ModelServer, folder: Path) -> AgentSettings:
    provider = "model_providers.stepgguf"
    config: dict[str, str | int | bool] = {
        "model": server.model,
        "model_provider": "stepgguf",
        "model_context_window": server.n_ctx,
        f"{provider}.name": "stepgguf",
        f"{provider}.base_url": f"{server.url}/v1",
        f"{provider}.wire_api": "responses",
        f"{provider}.env_key": KEY_VARIABLE,
        f"{provider}.stream_idle_timeout_ms": WAIT_MS,
        "analytics.enabled": False,
        "check_for_update_on_startup": False,
    }
    # JSON's texts, numbers and booleans are TOML's too.
    options = (part for key, value in config.items() for part in ("-c", f"{key}={json.dumps(value)}"))
    return AgentSettings(tuple(options), {"CODEX_HOME": str(folder), KEY_VARIABLE: server.key})


CODEX = Agent("codex", "npm install -g @openai/codex", _configure)
