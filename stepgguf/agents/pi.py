"""pi: Chat Completions, by a models.json in its own folder (PI_CODING_AGENT_DIR), where its sessions are too."""

from __future__ import annotations

import json
from pathlib import Path

from stepgguf.agents.agent import KEY_VARIABLE, Agent, AgentSettings, longest_answer
from stepgguf.agents.model_server import ModelServer


def _configure(server: ModelServer, folder: Path) -> AgentSettings:
    model = {
        "id": server.model,
        "reasoning": True,
        "contextWindow": server.n_ctx,
        "maxTokens": longest_answer(server),
    }
    provider = {
        "baseUrl": f"{server.url}/v1",
        "api": "openai-completions",
        "apiKey": f"!printenv {KEY_VARIABLE}",  # older versions take a variable's name, newer ones $NAME; both commands
        "models": [model],
    }
    return AgentSettings(
        arguments=("--provider", "stepgguf", "--model", server.model),
        environment={
            "PI_CODING_AGENT_DIR": str(folder),
            "PI_SKIP_VERSION_CHECK": "1",
            "PI_TELEMETRY": "0",
            KEY_VARIABLE: server.key,
        },
        files={"models.json": json.dumps({"providers": {"stepgguf": provider}}, indent=1)},
    )


PI = Agent("pi", "npm install -g @earendil-works/pi-coding-agent", _configure)
