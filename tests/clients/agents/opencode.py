"""opencode, in each of the three dialects: a tool loop with a picture in it, and a context that runs full."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from stepgguf.agents.opencode import OPENCODE
from tests.clients.agents.stage import MODEL, PNG, UNSEEN, Stage, call, installed, stage, thought

DIALECTS = {
    "chat completions": "@ai-sdk/openai-compatible",
    "Responses": "@ai-sdk/openai",
    "Messages": "@ai-sdk/anthropic",
}
CONFIG = "OPENCODE_CONFIG_CONTENT"
OFFLINE = ("AUTOUPDATE", "MODELS_FETCH", "DEFAULT_PLUGINS", "LSP_DOWNLOAD")
SUMMARY = "The notes were read up to line 750."


def ask(scene: Stage, opencode: Path, package: str) -> str:
    """What it prints. It believes that the context is larger than it is, and that pictures can be seen."""
    environment = dict(scene.settings(OPENCODE, n_ctx=131_072).environment)
    config = json.loads(environment[CONFIG])
    provider = config["provider"]["stepgguf"]
    provider["npm"] = package
    provider["models"][MODEL] |= {"attachment": True, "modalities": {"input": ["text", "image"], "output": ["text"]}}
    environment[CONFIG] = json.dumps(config)
    (scene.home / "picture.png").write_bytes(PNG)
    (scene.home / "notes.txt").write_text("the rain in Spain stays mainly in the plain\n" * 5000)
    command = [opencode, "run", "Look at picture.png and notes.txt."]
    return scene.run(command, environment | {f"OPENCODE_DISABLE_{name}": "1" for name in OFFLINE})


def is_about_the_title(prompt: str) -> bool:
    return "\n# Tools\n" not in prompt and "summary" not in prompt


def tool_loop(opencode: Path, dialect: str) -> bool:
    def answer(prompt: str) -> str:
        if is_about_the_title(prompt):
            return thought("Notes")
        if "the rain in Spain" in prompt:
            return thought("The notes are about rain.")
        if "<tool_response>" in prompt:
            return thought(call("read", filePath=str(scene.home / "notes.txt"), limit="3"))
        return thought(call("read", filePath=str(scene.home / "picture.png")))

    with stage(answer) as scene:
        output = ask(scene, opencode, DIALECTS[dialect])
        scene.check(f"{dialect}: two tools are called one after the other", "The notes are about rain." in output)
        scene.check(f"{dialect}: the model is shown {UNSEEN}", any(UNSEEN in p for p in scene.engine.prompts))
        return scene.passed


def full_context(opencode: Path, dialect: str) -> bool:
    def answer(prompt: str) -> str:
        if is_about_the_title(prompt):
            return thought("Notes")
        if "\n# Tools\n" not in prompt:
            return thought(SUMMARY)
        if SUMMARY in prompt:
            return thought("The notes are about rain.")
        offset = 250 * len(scene.engine.prompts)
        return thought(call("read", filePath=str(scene.home / "notes.txt"), offset=str(offset), limit="250"))

    with stage(answer, n_ctx=20_000) as scene:
        output = ask(scene, opencode, DIALECTS[dialect])
        scene.check(f"{dialect}: {'; '.join(scene.engine.refused)}", scene.engine.refused)
        scene.check(f"{dialect}: it is compacted and goes on", "The notes are about rain." in output)
        return scene.passed


def main() -> int:
    with installed("opencode-ai", "opencode") as opencode:
        passed = [act(opencode, dialect) for dialect in DIALECTS for act in (tool_loop, full_context)]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
