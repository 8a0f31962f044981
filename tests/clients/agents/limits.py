"""Agents whose model never comes to an end: what a server's limits for one message of a user do to them."""

from __future__ import annotations

import re
import sys
import urllib.request
from pathlib import Path

from stepgguf.agents.agent import Agent
from stepgguf.agents.catalogue import AGENTS
from tests.clients.agents.launch import ACTS, launch, package
from tests.clients.agents.stage import Stage, installed, stage, thought

FEW = 2  # refusals until an agent believes them


def reached(scene: Stage, limit: str) -> int:
    """How many requests were held back by a limit."""
    with urllib.request.urlopen(scene.url + "/metrics") as response:
        found = re.search(rf'stepgguf_task_limits_total{{limit="{limit}"}} (\d+)', response.read().decode())
    return int(found[1]) if found else 0


def never_done(agent: Agent, program: Path) -> bool:
    """Each call reads another file, so only the tokens end it."""
    words, read = ACTS[agent.command]

    def answer(prompt: str) -> str:
        if "\n# Tools\n" not in prompt:
            return thought("Birds")
        return thought(read(str(scene.home / f"notes-{len(scene.engine.prompts)}.txt")))

    with stage(answer, task_tokens=600) as scene:
        output = launch(scene, agent, program, *words)
        name, said = agent.command, " ".join(output.split())
        refused, answered = reached(scene, "tokens"), len(scene.engine.prompts)
        scene.check(f"{name}: ends after {answered} answers, {refused} refusals", answered < 20 and refused <= FEW)
        # Codex gives up when its last answer is cut, and sends nothing more that could be refused.
        scene.check(f"{name}: says why", "has used up the 600 tokens" in said or "reason: max_output_tokens" in said)
        return scene.passed


def same_again(agent: Agent, program: Path) -> bool:
    words, read = ACTS[agent.command]

    def answer(prompt: str) -> str:
        if "\n# Tools\n" not in prompt:
            return thought("Birds")
        if (scene.engine.token_id("<tool_call>"), float("-inf")) in scene.engine.requests[-1].sampling.logit_bias:
            return thought("I cannot find a bird.")
        return thought(read(str(scene.home / "notes.txt")))

    with stage(answer, task_repeats=3) as scene:
        (scene.home / "notes.txt").write_text("Nothing but fog.\n")
        output = launch(scene, agent, program, *words)
        name = agent.command
        scene.check(f"{name}: ends after {len(scene.engine.prompts)} answers", reached(scene, "repeats") == 1)
        scene.check(f"{name}: with the model's words", "I cannot find a bird." in output)
        return scene.passed


def main() -> int:
    passed = []
    for name in sys.argv[1:] or list(ACTS):
        agent = AGENTS[name]
        with installed(package(agent), name) as program:
            passed += [act(agent, program) for act in (never_done, same_again)]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
