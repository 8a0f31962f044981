"""Codex: its own tools and an MCP server's, a picture from a tool, a session that is resumed, a patch in free text, a
context that runs full."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from stepgguf.agents.codex import CODEX
from tests.clients.agents.stage import MODEL, PNG, UNSEEN, Stage, call, installed, stage, thought

SUMMARY = "The notes were read four times."
CONTEXT = 26_000  # tokens; its own instructions and tools are 15,000
# An MCP server with one tool, over stdin and stdout.
NOTES = """
import json, sys
TOOL = {"name": "read_note", "description": "Reads a note.", "inputSchema": {
    "type": "object", "properties": {"title": {"type": "string"}}, "required": ["title"]}}
for line in sys.stdin:
    message = json.loads(line)
    if "id" not in message:
        continue
    params = message.get("params", {})
    found = {
        "initialize": lambda: {"protocolVersion": params["protocolVersion"], "capabilities": {"tools": {}},
                               "serverInfo": {"name": "notes", "version": "1"}},
        "tools/list": lambda: {"tools": [TOOL]},
        "tools/call": lambda: {"content": [{"type": "text", "text": f"{params['arguments']['title']}: milk, 42 eggs"}]},
    }.get(message["method"], dict)()
    print(json.dumps({"jsonrpc": "2.0", "id": message["id"], "result": found}), flush=True)
"""
PATCH = """*** Begin Patch
*** Update File: poem.txt
@@
 Roses are red,
-violets are "green".
+violets are "blue" \\ {not green}.
*** End Patch"""


def codex(scene: Stage, program: Path, *words: str, config: str | None = None) -> str:
    """What its model says last. config: one more line of its configuration."""
    settings = scene.settings(CODEX)
    server = ["-c", f'mcp_servers.notes={{command={json.dumps(sys.executable)}, args=["-c", {json.dumps(NOTES)}]}}']
    more = ["-c", config] if config else []
    last = scene.home / "last.txt"
    last.unlink(missing_ok=True)
    options = ["--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox", "-o", last]
    command = [program, *settings.arguments, *server, *more, "exec", *options, *words]
    scene.run(command, settings.environment)
    return last.read_text().strip() if last.exists() else ""


def tools(program: Path) -> bool:
    """One of its own, one of an MCP server, and one that returns a picture, in one turn; then the session goes on."""
    answers = [
        thought(call("exec_command", cmd="echo from the shell > made.txt")),
        thought(call("mcp__notes__read_note", title="shopping")),
        thought(call("view_image", path="picture.png")),
        thought("There are eggs."),
        thought("There were 42."),
    ]
    with stage(lambda prompt: answers[len(scene.engine.prompts) - 1]) as scene:
        (scene.home / "picture.png").write_bytes(PNG)
        found = codex(scene, program, "What is on the list?")
        scene.check("its defaults are taken, and the turn comes to its end", found == "There are eggs.")
        made = scene.home / "made.txt"
        scene.check("its own tool ran", made.exists() and made.read_text() == "from the shell\n")
        scene.check("the MCP server's tool ran", "shopping: milk, 42 eggs" in scene.engine.prompts[-1])
        shown = "<function=mcp__notes__read_note>\n<parameter=title>\nshopping\n" in scene.engine.prompts[-1]
        scene.check("and the model sees its call under the name that it knows", shown)
        scene.check(f"for the picture it sees {UNSEEN}", UNSEEN in scene.engine.prompts[-1])
        found = codex(scene, program, "resume", "--last", "How many?")
        scene.check("the session is resumed with its history", found == "There were 42.")
        scene.check("the picture's sentence included", scene.engine.prompts[-1].count(UNSEEN) == 1)
        return scene.passed


def patch(program: Path) -> bool:
    """For models that its catalog says so of, apply_patch is a custom tool: free text with a grammar."""
    answers = [thought(call("apply_patch", input=PATCH)), thought("Done.")]
    with stage(lambda prompt: answers[len(scene.engine.prompts) - 1]) as scene:
        models = json.loads(subprocess.run([program, "debug", "models"], capture_output=True, check=True).stdout)[
            "models"
        ]
        model = next(m for m in models if m["apply_patch_tool_type"] == "freeform" and m.get("tool_mode") is None)
        catalog = scene.home / "catalog.json"
        catalog.write_text(json.dumps({"models": [{**model, "slug": MODEL}]}))
        poem = scene.home / "poem.txt"
        poem.write_text('Roses are red,\nviolets are "green".\n')
        found = codex(scene, program, "Mend the poem.", config=f'model_catalog_json="{catalog}"')
        scene.check("the turn comes to its end", found == "Done.")
        wanted = 'Roses are red,\nviolets are "blue" \\ {not green}.\n'
        scene.check("the patch arrived as it was written", poem.read_text() == wanted)
        scene.check("the model was shown the grammar", "start: begin_patch hunk+ end_patch" in scene.engine.prompts[0])
        scene.check("and sees its call", f"<parameter=input>\n{PATCH}\n" in scene.engine.prompts[-1])
        return scene.passed


def full_context(program: Path) -> bool:
    """Told how long the context is, it compacts the conversation before it does not fit any more."""

    def answer(prompt: str) -> str:
        if "CONTEXT CHECKPOINT COMPACTION" in prompt:
            return thought(SUMMARY)
        if SUMMARY in prompt:
            return thought("The notes are about rain.")
        return thought(call("exec_command", cmd=f"echo {len(scene.engine.prompts)}; head -c 9000 notes.txt"))

    with stage(answer, n_ctx=CONTEXT) as scene:
        (scene.home / "notes.txt").write_text("the rain in Spain stays mainly in the plain\n" * 5000)
        found = codex(scene, program, "Read notes.txt")
        scene.check("it asks for a summary", any(SUMMARY in prompt for prompt in scene.engine.prompts))
        scene.check("and goes on with it", found == "The notes are about rain.")
        return scene.passed


def main() -> int:
    with installed("@openai/codex", "codex") as program:
        passed = [act(program) for act in (tools, patch, full_context)]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
