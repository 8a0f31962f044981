"""Claude Code: Anthropic's Messages, by environment variables.

Its own folder (CLAUDE_CONFIG_DIR) keeps it from the user's login and from settings that name another server; sessions,
memory and settings of what was launched here stay there. Every name under which it asks for a model, large or small, is
the one model. It asks nobody but the server: no telemetry, no updates.
"""

from __future__ import annotations

import json
from pathlib import Path

from stepgguf.agents.agent import Agent, AgentSettings
from stepgguf.agents.model_server import ModelServer

MODEL_VARIABLES = (
    "ANTHROPIC_MODEL",
    "ANTHROPIC_SMALL_FAST_MODEL",
    "ANTHROPIC_DEFAULT_HAIKU_MODEL",
    "ANTHROPIC_DEFAULT_SONNET_MODEL",
    "ANTHROPIC_DEFAULT_OPUS_MODEL",
    "CLAUDE_CODE_SUBAGENT_MODEL",
)
FIRST_STATE = {"hasCompletedOnboarding": True}  # else it begins with a login


def _configure(server: ModelServer, folder: Path) -> AgentSettings:
    return AgentSettings(
        environment={
            "CLAUDE_CONFIG_DIR": str(folder),
            "ANTHROPIC_BASE_URL": server.url,
            "ANTHROPIC_AUTH_TOKEN": server.key,
            **dict.fromkeys(MODEL_VARIABLES, server.model),
            "CLAUDE_CODE_MAX_CONTEXT_TOKENS": str(server.n_ctx),
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        },
        first_files={".claude.json": json.dumps(FIRST_STATE)},
    )


CLAUDE = Agent("claude", "npm install -g @anthropic-ai/claude-code", _configure)
