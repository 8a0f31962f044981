"""Files of text and of dialogues as tokens of a source's model.

    notes.txt      the whole text, but for its last newline; control tokens written in it are letters
    chats.jsonl    a dialogue a line, {"messages": [...], "tools": [...]}, rendered with the model's own chat template,
                   reasoning included; control tokens become their ids

The ids are llama.cpp's, and no engine is needed for them. Neither has the token in front that begins a sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from stepgguf.calibration.tokenizer import TextTokenizer
from stepgguf.chat.messages import normalize_messages
from stepgguf.chat.template import ChatTemplate
from stepgguf.convert.metadata import CHAT_TEMPLATE
from stepgguf.convert.sources.source import TensorSource
from stepgguf.errors import BadMetadata, TemplateRefused, TextError
from stepgguf.files import json_lines, textfile
from stepgguf.files.json_lines import Line

DIALOGUES = ".jsonl"
_MOST_BYTES = 2**30
_CHAT_HINT = 'A line is a dialogue: {"messages": [{"role": "user", "content": "..."}, ...], "tools": [...]}.'


class SourceTokenizer:
    """Reads files as tokens of a source's model. begin: the token that begins a sequence, None if there is none.

    BadMetadata if the source has a tokenizer that is none of Step-3's.
    """

    def __init__(self, source: TensorSource) -> None:
        shapes = [(spec.name, spec.shape) for spec in source.specs]
        keys = {key.name: key for key in source.metadata(None, None).file_keys(shapes, with_mtp=True)}
        self._document = str(source.path)
        self._tokenizer = TextTokenizer.of_keys(keys, self._document)
        self._template = keys[CHAT_TEMPLATE].value if CHAT_TEMPLATE in keys else None
        self.begin, self.n_vocab = self._tokenizer.begin, self._tokenizer.n_vocab

    @property
    def begin_ids(self) -> list[int]:
        """What stands in front of a sequence: `begin`, or nothing."""
        return [] if self.begin is None else [self.begin]

    def plain_text(self, path: Path) -> list[int]:
        """The tokens of a file of text. TextError if it is none, or is empty."""
        text = textfile.read(path, TextError, most=_MOST_BYTES)
        if not text:
            raise TextError(f"{path}: the file is empty", hint="Give a file with text in it.")
        # Without the last newline, as llama.cpp's tools read a file.
        return self._tokenizer.tokenize(text.removesuffix("\n"), parse_special=False)

    def dialogues(self, path: Path) -> Iterator[list[int]]:
        """The tokens of each dialogue of a file. TextError, which names file and line, for what cannot be used.

        BadMetadata if the model has no chat template.
        """
        if self._template is None:
            raise BadMetadata(
                f"{self._document}: {path.name} has dialogues, and the model has no chat template",
                hint="Give it one (stepgguf template FILE.gguf NEW.jinja), or plain texts only.",
            )
        template = ChatTemplate(self._template, bos_token=self._tokenizer.begin_text)
        begin = self.begin_ids
        for line in _read_lines(path):
            tokens = self._tokenizer.tokenize(_render(template, line), parse_special=True)
            yield tokens[len(begin) :] if tokens[:1] == begin else tokens  # the template may write it


def _read_lines(path: Path) -> list[Line]:
    try:
        lines = [line for line in json_lines.read_lines(path) if line.data.strip()]
    except OSError as error:
        raise TextError(f"{path}: {error.strerror}", hint="Give a file that can be read.") from error
    if not lines:
        raise TextError(f"{path}: no dialogues", hint=_CHAT_HINT)
    return lines


def _render(template: ChatTemplate, line: Line) -> str:
    """A dialogue's text. TextError if the line holds none, or if the template refuses it."""
    chat = line.parse(TextError, _CHAT_HINT)
    messages, tools = chat["messages"].array(), chat.get("tools")
    for message in messages:
        message["role"].text()
    if not messages:
        raise chat["messages"].wrong("at least one message")
    offered = [tool.object() for tool in tools.array()] if tools is not None else None
    normalized = normalize_messages([message.object() for message in messages])
    try:
        return template.render(normalized, tools=offered, add_generation_prompt=False)
    except TemplateRefused as error:
        raise TextError(f"{chat.document}: {error.message}", hint=_CHAT_HINT) from error
