"""Claude Code: a picture that its own tool returns, a picture that the user sends, a context that runs full."""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path
from typing import Any

from stepgguf.agents.claude import CLAUDE
from tests.clients.agents.stage import PNG, UNSEEN, Stage, call, installed, stage, thought

SUMMARY = "The notes were read up to line 750."


def ask(scene: Stage, claude: Path, input: str, *options: str, n_ctx: int | None = None) -> list[dict[str, Any]]:
    """The messages of one run, the result last. n_ctx: how long it believes the context to be."""
    command = [claude, "-p", "--output-format", "stream-json", "--verbose", "--allowedTools", "Read", *options]
    output = scene.run(command, scene.settings(CLAUDE, n_ctx).environment, input)
    messages = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    if not messages or messages[-1]["type"] != "result":
        return [*messages, {"type": "result", "result": None, "is_error": True}]
    return messages


def result(messages: list[dict[str, Any]]) -> str | None:
    text: str | None = None if messages[-1]["is_error"] else messages[-1]["result"]
    return text


def picture_of_a_tool(claude: Path) -> bool:
    def answer(prompt: str) -> str:
        if "<tool_response>" in prompt:
            return thought("The picture cannot be seen.")
        return thought(call("Read", file_path=str(scene.home / "picture.png")))

    with stage(answer) as scene:
        (scene.home / "picture.png").write_bytes(PNG)
        found = ask(scene, claude, "What does picture.png show?")
        scene.check("Read returns a picture, and the session goes on", result(found) == "The picture cannot be seen.")
        seen = f"<tool_response>{UNSEEN}</tool_response>"
        scene.check(f"the model is shown {UNSEEN}", scene.shown("tool_response", seen))
        again = ask(scene, claude, "And now?", "--continue")
        scene.check("the same history is taken once more", result(again) and scene.shown("tool_response", seen))
        return scene.passed


def picture_of_the_user(claude: Path) -> bool:
    source = {"type": "base64", "media_type": "image/png", "data": base64.b64encode(PNG).decode()}
    content = [{"type": "text", "text": "What is this?"}, {"type": "image", "source": source}]
    message = {"type": "user", "message": {"role": "user", "content": content}, "parent_tool_use_id": None}
    with stage(lambda prompt: thought("Say it in words.")) as scene:
        line = json.dumps({**message, "session_id": "a"}) + "\n"
        found = ask(scene, claude, line, "--input-format", "stream-json")
        texts = [block.get("text", "") for m in found if m["type"] == "assistant" for block in m["message"]["content"]]
        print("        ", next((text for text in texts if "image" in text), texts))
        scene.check("a picture from the user is refused, taken out, and answered", result(found) == "Say it in words.")
        return scene.passed


def full_context(claude: Path) -> bool:
    """The notes are read part by part until they do not fit any more."""

    def answer(prompt: str) -> str:
        if "Respond with TEXT ONLY" in prompt:
            return thought(f"<analysis>Notes.</analysis>\n<summary>{SUMMARY}</summary>")
        if SUMMARY in prompt:
            return thought("The notes are about rain.")
        offset = 250 * len(scene.engine.prompts)
        return thought(call("Read", file_path=str(scene.home / "notes.txt"), offset=str(offset), limit="250"))

    with stage(answer, n_ctx=40_000) as scene:
        (scene.home / "notes.txt").write_text("the rain in Spain stays mainly in the plain\n" * 5000)
        found = ask(scene, claude, "Read all of notes.txt", n_ctx=200_000)
        print("        ", *(f"{message};" for message in scene.engine.refused))
        kinds = [message.get("subtype") for message in found]
        scene.check("a prompt is refused because it is too long", scene.engine.refused)
        scene.check("the conversation is compacted", "compact_boundary" in kinds)
        scene.check("and goes on", result(found) == "The notes are about rain.")
        return scene.passed


def main() -> int:
    with installed("@anthropic-ai/claude-code", "claude") as claude:
        passed = [act(claude) for act in (picture_of_a_tool, picture_of_the_user, full_context)]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
