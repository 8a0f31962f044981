"""All agents, started by `stepgguf launch`: each reads a file with its own tool and answers; its key reaches the server
and no other key does; what it keeps lies where it should."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

from stepgguf.agents.agent import Agent
from stepgguf.agents.catalogue import AGENTS
from tests.clients.agents.stage import Stage, call, installed, stage, thought

KEY = "the-key-of-this-server"
STOLEN = "a-key-of-a-cloud"
ASKED = "Which bird is in notes.txt?"
# What each is asked with, without a person, and how its model reads a file in its folder.
ACTS = {
    "claude": (["-p", ASKED, "--allowedTools", "Read"], lambda path: call("Read", file_path=path)),
    "codex": (["exec", "--skip-git-repo-check", ASKED], lambda path: call("exec_command", cmd=f"cat {path}")),
    "opencode": (["run", ASKED], lambda path: call("read", filePath=path)),
    "qwen": (["-p", ASKED], lambda path: call("read_file", file_path=path)),
    "pi": (["-p", ASKED], lambda path: call("read", path=path)),
}


def package(agent: Agent) -> str:
    return agent.install.rpartition(" ")[2]


def tool_loop(agent: Agent, program: Path) -> bool:
    words, read = ACTS[agent.command]

    def answer(prompt: str) -> str:
        if "\n# Tools\n" not in prompt:
            return thought("Birds")  # a title
        if "<tool_response>" in prompt:
            return thought("The bird is a heron." if "a heron stood" in prompt else "I cannot read it.")
        return thought(read(str(scene.home / "notes.txt")))

    with stage(answer, api_key=KEY) as scene:
        (scene.home / "notes.txt").write_text("At the pond a heron stood.\n")
        output = launch(scene, agent, program, *words)
        name = agent.command
        scene.check(f"{name}: reads the file and answers", "The bird is a heron." in output)
        scene.check(f"{name}: no key is in what it keeps", not list(files_with(scene.home, KEY, STOLEN)))
        return scene.passed


def launch(scene: Stage, agent: Agent, program: Path, *words: str) -> str:
    command = [sys.executable, "-m", "stepgguf", "launch", agent.command, "--url", scene.url, "--", *words]
    stolen = dict.fromkeys(("ANTHROPIC_API_KEY", "OPENAI_API_KEY", "OPENROUTER_API_KEY"), STOLEN)
    elsewhere = {"ANTHROPIC_BASE_URL": "http://127.0.0.1:9", "OPENAI_BASE_URL": "http://127.0.0.1:9"}
    key = {"STEPGGUF_API_KEY": KEY}
    path = {"PATH": f"{program.parent}:{os.environ['PATH']}", "PYTHONPATH": str(Path.cwd())}
    return scene.run(command, {**stolen, **elsewhere, **path, **key})


def files_with(folder: Path, *words: str) -> list[Path]:
    found = []
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            if path.is_file() and any(word.encode() in path.read_bytes() for word in words):
                found.append(path)
    return found


def main() -> int:
    names = sys.argv[1:] or list(ACTS)
    passed = []
    for name in names:
        with installed(package(AGENTS[name]), name) as program:
            passed.append(tool_loop(AGENTS[name], program))
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
