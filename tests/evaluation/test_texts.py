"""The texts that come with eval: long enough, renderable, and in no text for calibration."""

from __future__ import annotations

import json
from pathlib import Path

import stepgguf.calibration
from stepgguf.chat.messages import normalize_messages
from stepgguf.chat.template import ChatTemplate
from stepgguf.demo import CHECKPOINT
from stepgguf.demo.tokenizer import pre_tokenizer
from stepgguf.evaluation.texts import default_texts

CHATS, TEXT = default_texts()


def test_the_text_is_long_enough_for_the_default_contexts_with_the_published_tokenizer() -> None:
    words = pre_tokenizer().pre_tokenize_str(TEXT.read_text())
    assert len(words) >= 2 * 2048  # a word is at least one token


def test_dialogues_have_thinking_and_tools_in_them() -> None:
    template = ChatTemplate((CHECKPOINT / "chat_template.jinja").read_text())
    chats = [json.loads(line) for line in CHATS.read_text().splitlines()]
    texts = [
        template.render(normalize_messages(c["messages"]), tools=c.get("tools"), add_generation_prompt=False)
        for c in chats
    ]
    assert all("<think>" in text for text in texts)
    assert sum("<tool_call>" in text for text in texts) >= 2


def test_no_line_is_in_a_text_for_calibration() -> None:
    [folder] = stepgguf.calibration.__path__
    seen = "\n".join(path.read_text() for path in Path(folder, "texts").iterdir())
    lines = [line for path in (TEXT, CHATS) for line in path.read_text().splitlines() if len(line) > 40]
    assert lines
    assert not [line for line in lines if line in seen]
