"""The environment that an agent runs in: the user's, without what leads to a model in a cloud."""

from __future__ import annotations

import re
from collections.abc import Mapping
from urllib.parse import urlsplit

from stepgguf.agents.agent import AgentSettings
from stepgguf.agents.model_server import ModelServer

# Agents take whichever provider has a key in the environment. What is said to Anthropic's and OpenAI's libraries goes
# altogether: addresses and names of models too.
_VENDORS = (
    "AI_GATEWAY AZURE_OPENAI CEREBRAS CODEX COHERE DASHSCOPE DEEPINFRA DEEPSEEK FIREWORKS GEMINI GOOGLE "
    "GOOGLE_GENERATIVE_AI GROQ KIMI MINIMAX MINIMAX_CN MISTRAL MOONSHOT NVIDIA OPENCODE OPENROUTER PERPLEXITY QWEN "
    "TOGETHER XAI XIAOMI ZAI ZHIPU"
).split()
_CLOUD = re.compile(
    rf"(?:ANTHROPIC|OPENAI)_.*|CLAUDE_CODE_(?:USE|OAUTH|SKIP)_.*|(?:{'|'.join(_VENDORS)})_API_KEY"
    "|AWS_BEARER_TOKEN_BEDROCK|COPILOT_GITHUB_TOKEN"
)


def agent_environment(user: Mapping[str, str], server: ModelServer, settings: AgentSettings) -> dict[str, str]:
    """Return the environment for an agent with these settings. user: the environment that this program was given.

    A proxy of the user's is not asked for the server.
    """
    kept = {name: value for name, value in user.items() if not _CLOUD.fullmatch(name)}
    host = urlsplit(server.url).hostname or ""
    for name in ("NO_PROXY", "no_proxy"):
        kept[name] = ",".join(filter(None, (kept.get(name, ""), host)))
    return {**kept, **settings.environment}
