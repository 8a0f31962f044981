"""The agents, by the names that `stepgguf launch` has for them."""

from __future__ import annotations

from collections.abc import Mapping

from stepgguf.agents.agent import Agent
from stepgguf.agents.claude import CLAUDE
from stepgguf.agents.codex import CODEX
from stepgguf.agents.opencode import OPENCODE
from stepgguf.agents.pi import PI
from stepgguf.agents.qwen import QWEN

AGENTS: Mapping[str, Agent] = {agent.command: agent for agent in (CLAUDE, CODEX, OPENCODE, QWEN, PI)}
