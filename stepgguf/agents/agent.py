"""What an agent is to us: a program, how it is installed, and the settings that make it use a server."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from stepgguf.agents.model_server import ModelServer

# The environment variable in which an agent finds the key of the server: its configuration names the variable and never
# holds the key.
KEY_VARIABLE = "STEPGGUF_AGENT_KEY"
ANSWER_SHARE = 4  # a quarter of the context is the most that an agent should reserve for one answer
MOST_ANSWER = 32_768  # tokens
WAIT_MS = 3_600_000  # milliseconds until a client gives a request up: long prompts are read for minutes


@dataclass(frozen=True, slots=True)
class AgentSettings:
    """What makes a program use one server.

    arguments: they stand before the user's. environment: added to what `environment.py` leaves of the user's. files:
    texts by their path in the agent's folder, written before every start. first_files: written only where there is no
    such file yet, and the program's own from then on.
    """

    arguments: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    first_files: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Agent:
    """A program that `stepgguf launch` runs. `command`: its name on the PATH; `install`: the command line that puts it
    there. `configure` takes the server, and the folder in which the program keeps what is its own."""

    command: str
    install: str
    configure: Callable[[ModelServer, Path], AgentSettings]


def longest_answer(server: ModelServer) -> int:
    """Return the tokens that an agent should reserve for one answer when it reckons what of the context is left."""
    return min(MOST_ANSWER, server.n_ctx // ANSWER_SHARE)
