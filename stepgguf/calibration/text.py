"""Texts to calibrate with, as rows of tokens: plain text cut as llama-imatrix cuts it, dialogues packed whole.

    notes.txt      begin + tokens of the whole text, cut into rows; each row's first token becomes `begin`;
                   what is left at the end is dropped; control tokens written in it are letters
    chats.jsonl    a dialogue a line, {"messages": [...], "tools": [...]}, rendered with the model's own chat template,
                   reasoning included. Each is a document that starts with `begin`; a row holds as many as find room,
                   which do not see each other, and a longer one is cut into several documents

Rows of several files alternate, so that the first rows have something of each.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from stepgguf.calibration.tokenizer import TextTokenizer
from stepgguf.chat.messages import normalize_messages
from stepgguf.chat.template import ChatTemplate
from stepgguf.convert.metadata import CHAT_TEMPLATE
from stepgguf.convert.sources.source import TensorSource
from stepgguf.errors import BadMetadata, TemplateRefused, TextError
from stepgguf.files import json_lines, textfile
from stepgguf.files.json_lines import Line
from stepgguf.reference.token_rows import PADDING, TokenRows

DEFAULT_TEXTS = Path(__file__).parent / "texts"  # written for this project
DIALOGUES = ".jsonl"
_MOST_BYTES = 2**30
_OPEN_ROWS = 64  # that a dialogue may still go into
_CHAT_HINT = 'A line is a dialogue: {"messages": [{"role": "user", "content": "..."}, ...], "tools": [...]}.'


def default_texts() -> list[Path]:
    """The texts that come with the package: prose in several languages, mathematics, code, dialogues with tools."""
    return sorted(path for path in DEFAULT_TEXTS.iterdir() if path.suffix in (".txt", DIALOGUES))


class TextReader:
    """Reads texts as rows of `length` tokens of a source's model.

    BadMetadata if the source has a tokenizer that is none of Step-3's.
    """

    def __init__(self, source: TensorSource, length: int) -> None:
        shapes = [(spec.name, spec.shape) for spec in source.specs]
        keys = {key.name: key for key in source.metadata(None, None).file_keys(shapes, with_mtp=True)}
        self._document, self._length = str(source.path), length
        self._tokenizer = TextTokenizer.of_keys(keys, self._document)
        self._template = keys[CHAT_TEMPLATE].value if CHAT_TEMPLATE in keys else None

    def read(self, paths: Sequence[Path]) -> TokenRows:
        """The rows of some files. TextError, which names file and line, for what cannot be used.

        BadMetadata if there are dialogues and the model has no chat template.
        """
        return _alternate([self._dialogues(p) if p.suffix == DIALOGUES else self._plain_text(p) for p in paths])

    def _plain_text(self, path: Path) -> TokenRows:
        text = textfile.read(path, TextError, most=_MOST_BYTES)
        begin = self._begin()
        # Without the last newline, as llama.cpp's tools read a file.
        tokens = [*begin, *self._tokenizer.tokenize(text.removesuffix("\n"), parse_special=False)]
        n = len(tokens) // self._length
        if n == 0:
            found = f"{len(tokens)} tokens" if text else "the file is empty"
            raise TextError(
                f"{path}: {found}, and a chunk has {self._length} tokens",
                hint="Give a longer text, or a smaller --chunk.",
            )
        rows = np.array(tokens[: n * self._length], np.int32).reshape(n, self._length)
        rows[:, : len(begin)] = begin
        return TokenRows.of(rows)

    def _dialogues(self, path: Path) -> TokenRows:
        if self._template is None:
            raise BadMetadata(
                f"{self._document}: {path.name} has dialogues, and the model has no chat template",
                hint="Give it one (stepgguf template FILE.gguf NEW.jinja), or plain texts only.",
            )
        template, begin = ChatTemplate(self._template), self._begin()
        documents: list[list[int]] = []
        lines = [line for line in json_lines.read_lines(path) if line.data.strip()]
        if not lines:
            raise TextError(f"{path}: no dialogues", hint=_CHAT_HINT)
        for line in lines:
            tokens = self._tokenizer.tokenize(_render(template, line), parse_special=True)
            documents += _cut(tokens[len(begin) :] if tokens[:1] == begin else tokens, begin, self._length)
        return pack_documents(documents, self._length)

    def _begin(self) -> list[int]:
        return [] if self._tokenizer.begin is None else [self._tokenizer.begin]


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


def _cut(tokens: Sequence[int], begin: Sequence[int], length: int) -> Iterator[list[int]]:
    """A dialogue as documents of at most `length` tokens, each with `begin` in front."""
    step = length - len(begin)
    return ([*begin, *tokens[start : start + step]] for start in range(0, len(tokens), step))


def pack_documents(documents: Iterable[Sequence[int]], length: int) -> TokenRows:
    """Rows of whole documents: each goes into the first of the latest rows that has room for it."""
    rows: list[list[Sequence[int]]] = []
    room: list[int] = []
    for document in documents:
        latest = range(max(0, len(rows) - _OPEN_ROWS), len(rows))
        row = next((i for i in latest if room[i] >= len(document)), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(length)
        rows[row].append(document)
        room[row] -= len(document)
    tokens, numbers = np.zeros((len(rows), length), np.int32), np.full((len(rows), length), PADDING, np.int32)
    for i, row_documents in enumerate(rows):
        text = [token for document in row_documents for token in document]
        tokens[i, : len(text)] = text
        numbers[i, : len(text)] = np.repeat(np.arange(len(row_documents)), list(map(len, row_documents)))
    return TokenRows(tokens, numbers)


def _alternate(parts: Sequence[TokenRows]) -> TokenRows:
    """The rows of several texts in one order, each text's spread evenly over all."""
    places = np.concatenate([(np.arange(part.n_rows) + 0.5) / part.n_rows for part in parts])
    order = np.argsort(places, kind="stable")
    tokens, documents = (
        np.concatenate([getattr(part, name) for part in parts])[order] for name in ("tokens", "documents")
    )
    return TokenRows(tokens, documents)
