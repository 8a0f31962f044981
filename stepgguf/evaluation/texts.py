"""From files of text to columns, with the tokenizer and the chat template of the evaluated GGUF.

    *.txt, *.md, ...   plain text, UTF-8; special tokens in it are read as the characters that they are
    *.jsonl            chats, one a line: {"messages": [...], "tools": [...]}; rendered, with their reasoning

Plain texts are joined to one. There is always a column of random tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from stepgguf.chat.messages import normalize_messages
from stepgguf.chat.template import ChatTemplate
from stepgguf.errors import EvaluationError, TemplateRefused
from stepgguf.evaluation.columns import Column, dialogue_column, random_column, require_predictions, text_column
from stepgguf.files import json_lines, textfile
from stepgguf.runtime.llama.model import LlamaModel

HELD_OUT = Path(__file__).parent / "texts"  # written for this project, and in no text for calibration
RANDOM_ROWS = 8
_MOST_BYTES = 2**30
_CHAT_HINT = 'A line is a chat: {"messages": [{"role": "user", "content": "..."}, ...], "tools": [...]}.'


def default_texts() -> list[Path]:
    """Return the texts that come with the package: prose in ten languages, code, mathematics, dialogues with tools."""
    return sorted(HELD_OUT.iterdir())


def make_columns(
    model: LlamaModel, paths: Sequence[Path], contexts: Sequence[int], n_rows: int | None
) -> tuple[Column, ...]:
    """Return the columns of a text: one for each context, the random tokens, and the dialogues if there are any.

    n_rows: so many rows of each at most. EvaluationError if a file cannot be read or there is too little text.
    """
    chats = [path for path in paths if path.suffix == ".jsonl"]
    columns = list(_text_columns(model, [path for path in paths if path not in chats], contexts))
    columns.append(random_column(model.n_vocab, contexts[0], RANDOM_ROWS))
    if chats:
        columns.append(dialogue_column(_read_dialogues(model, chats)))
    columns = [column.cut(n_rows) for column in columns]
    for column in columns:
        require_predictions(column)
    return tuple(columns)


def _text_columns(model: LlamaModel, paths: Sequence[Path], contexts: Sequence[int]) -> Iterator[Column]:
    if not paths:
        return
    text = "".join(textfile.read(path, EvaluationError, most=_MOST_BYTES) for path in paths)
    # As llama-perplexity reads a file: without its last newline, and special tokens are not looked for.
    tokens = model.tokenize(text.removesuffix("\n"), add_special=True, parse_special=False)
    for n_ctx in contexts:
        yield text_column(tokens, n_ctx)


def _read_dialogues(model: LlamaModel, paths: Sequence[Path]) -> Iterator[list[int]]:
    source = model.metadata("tokenizer.chat_template")
    if source is None:
        raise EvaluationError(
            f"{model.path}: dialogues need a chat template, and the file has none",
            hint="Give it one: stepgguf template FILE.gguf NEW.jinja",
        )
    begin = "" if model.begin is None else model.piece(model.begin).decode(errors="replace")
    template = ChatTemplate(source, bos_token=begin)
    for path in paths:
        for text in _render_chats(template, path):
            yield model.tokenize(text, add_special=True)


def _render_chats(template: ChatTemplate, path: Path) -> Iterator[str]:
    try:
        lines = json_lines.read_lines(path)
    except OSError as error:
        raise EvaluationError(f"{path}: {error.strerror}", hint="Give a file that can be read.") from error
    for line in lines:
        chat = line.parse(EvaluationError, _CHAT_HINT)
        messages, tools = [message.object() for message in chat["messages"].array()], chat.get("tools")
        offered = [tool.object() for tool in tools.array()] if tools is not None else None
        try:
            yield template.render(normalize_messages(messages), tools=offered, add_generation_prompt=False)
        except TemplateRefused as error:
            raise EvaluationError(f"{chat.document}: {error.message}", hint=_CHAT_HINT) from error
