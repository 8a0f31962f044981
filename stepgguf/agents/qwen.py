"""Qwen Code: Chat Completions. The server is in OpenAI's variables, the rest in the file of settings that stands above
all others, so that the settings.json in its own folder (QWEN_HOME) stays the program's and the user's."""

from __future__ import annotations

import json
from pathlib import Path

from stepgguf.agents.agent import WAIT_MS, Agent, AgentSettings
from stepgguf.agents.model_server import ModelServer

# It sends everything through a proxy that these name, and knows no exception for a server on this machine.
PROXY_VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")
SETTINGS_FILE = "stepgguf-settings.json"


def _configure(server: ModelServer, folder: Path) -> AgentSettings:
    settings = {
        "security": {"auth": {"selectedType": "openai"}},
        "model": {
            "name": server.model,
            "generationConfig": {"contextWindowSize": server.n_ctx, "timeout": WAIT_MS},
        },
        "privacy": {"usageStatisticsEnabled": False},
        "general": {"enableAutoUpdate": False},
    }
    return AgentSettings(
        environment={
            "QWEN_HOME": str(folder),
            "QWEN_CODE_SYSTEM_SETTINGS_PATH": str(folder / SETTINGS_FILE),
            "OPENAI_BASE_URL": f"{server.url}/v1",
            "OPENAI_API_KEY": server.key,
            "OPENAI_MODEL": server.model,
            **dict.fromkeys(PROXY_VARIABLES, ""),
        },
        files={SETTINGS_FILE: json.dumps(settings, indent=1)},
    )


QWEN = Agent("qwen", "npm install -g @qwen-code/qwen-code", _configure)
