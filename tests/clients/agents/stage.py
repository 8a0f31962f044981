"""What the scripts here share: the real server before a model by script, an agent from a package registry, and a home
of its own for it, in which nothing leads out of this machine.

    python -m tests.clients.agents.claude_code

installs the agent into a temporary folder, lets it work, prints what happened, and ends with 1 if something is wrong.
The model's answers are texts in its own format, made from the prompt; all else is the real thing.
"""

from __future__ import annotations

import base64
import contextlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepgguf.agents.agent import Agent, AgentSettings
from stepgguf.agents.model_server import ModelServer
from stepgguf.chat.exchange import ChatModel
from stepgguf.cli.launching import prepare_folder
from stepgguf.server.config import ServerConfig
from tests.scripted_engine import ScriptedEngine
from tests.server.conftest import running

MODEL = "step-3.5-flash"
NOWHERE = "http://127.0.0.1:9"  # as a proxy: what is not on this machine cannot be reached
TIMEOUT = 180.0
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
UNSEEN = "[image: this model reads text only]"

Answer = Callable[[str], str]  # from the text of a prompt to what the model says to it, thinking first


def call(name: str, **arguments: str) -> str:
    """A tool call in the model's format."""
    values = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in arguments.items())
    return f"<tool_call>\n<function={name}>\n{values}</function>\n</tool_call>"


def thought(answer: str) -> str:
    return f"Let me see.\n</think>\n{answer}"


@dataclass
class Stage:
    """url: of the server, without /v1. home: an empty folder that is also the working directory. output: of the last
    run, shown when a check fails."""

    url: str
    engine: ScriptedEngine
    home: Path
    output: str = ""
    passed: bool = True

    def run(self, command: Sequence[str | Path], environment: Mapping[str, str], input: str = "") -> str:
        """Its output, stdout and stderr together. Nothing of this process's environment is passed on."""
        bare = {"PATH": os.environ["PATH"], "HOME": str(self.home), "TERM": "dumb", "NO_COLOR": "1"}
        bare |= {"HTTPS_PROXY": NOWHERE, "HTTP_PROXY": NOWHERE, "NO_PROXY": "127.0.0.1,localhost"}
        process = subprocess.Popen(
            [str(part) for part in command],
            cwd=self.home,
            env={**bare, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(input, timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            output = f"{command[0]} was still running after {TIMEOUT:g} s"
        finally:
            with contextlib.suppress(ProcessLookupError):  # and what it started
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self.output = output
        return output

    def settings(self, agent: Agent, n_ctx: int | None = None) -> AgentSettings:
        """What `stepgguf launch` makes the agent use this server with, the files in its folder written. n_ctx: how long
        it believes the context to be."""
        server = ModelServer(self.url, MODEL, n_ctx or self.engine.info.n_ctx)
        folder = self.home / agent.command
        settings = agent.configure(server, folder)
        prepare_folder(folder, settings)
        return settings

    def shown(self, role: str, text: str) -> bool:
        """Whether this is a whole turn of the last prompt. Roles: user, assistant, tool_response, system."""
        return bool(self.engine.prompts) and f"<|im_start|>{role}\n{text}<|im_end|>" in self.engine.prompts[-1]

    def check(self, what: str, holds: object) -> None:
        self.passed &= bool(holds)
        print("ok      " if holds else "FAILED  ", what, flush=True)
        if not holds:
            print(self.output)


@contextlib.contextmanager
def stage(answer: Answer, n_ctx: int = 131072, **config: Any) -> Iterator[Stage]:
    """config: more of the server's."""
    engine = ScriptedEngine(lambda request: engine.split(answer(engine.prompts[-1])), n_ctx=n_ctx)
    with tempfile.TemporaryDirectory() as home, running(ChatModel(engine), ServerConfig((MODEL,), **config)) as server:
        yield Stage(server.url, engine, Path(home))


@contextlib.contextmanager
def installed(package: str, command: str) -> Iterator[Path]:
    """The path of a package's command, from npm. The package is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        install = ["npm", "install", "--no-audit", "--no-fund", "--loglevel=error", "--prefix", folder, package]
        subprocess.run(install, check=True, stdout=subprocess.DEVNULL)
        path = Path(folder, "node_modules", ".bin", command)
        version = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout.strip()
        print(f"{package}: {version}", flush=True)
        yield path
