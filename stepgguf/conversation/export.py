"""A conversation as one document, for other programs or for people. `settings` are Session.settings_record()."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from stepgguf.conversation.records import AnswerOrigin, ConversationEntry


def export_json(origin: AnswerOrigin, settings: Mapping[str, object], entries: Sequence[ConversationEntry]) -> str:
    """Return the whole session as one JSON document."""
    kept = {key: value for key, value in settings.items() if key != "type"}
    messages = [entry.to_record() for entry in entries]
    for record in messages:
        del record["type"]
    document = {"origin": asdict(origin), "settings": kept, "messages": messages}
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


def export_markdown(origin: AnswerOrigin, settings: Mapping[str, object], entries: Sequence[ConversationEntry]) -> str:
    """Return the session as Markdown to be read: a heading for each message, reasoning folded away."""
    parts = [f"*{origin.model}*"]
    if settings.get("system"):
        parts.append(f"## System\n\n{settings['system']}")
    for entry in entries:
        message = entry.message
        parts.append({"user": "## You", "assistant": "## Answer", "tool": "## Tool result"}[message["role"]])
        if reasoning := message.get("reasoning_content"):
            parts.append(f"<details><summary>Thinking</summary>\n\n{reasoning}\n\n</details>")
        if message["content"]:
            parts.append(message["content"])
        for call in message.get("tool_calls", ()):
            function = call["function"]
            parts.append(f"Call of `{function['name']}`:\n\n```json\n{function['arguments']}\n```")
        if entry.interrupted:
            parts.append("*interrupted*")
    return "\n\n".join(parts) + "\n"
