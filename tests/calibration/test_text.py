"""Texts and dialogues as rows of tokens: what stands in a row, and what is said of files that cannot be used."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stepgguf.calibration.text import TextReader, default_texts, pack_documents
from stepgguf.chat.template import ChatTemplate
from stepgguf.cli.main import main
from stepgguf.convert.sources.opening import open_source
from stepgguf.demo import CHECKPOINT
from stepgguf.demo.train import Encoder
from stepgguf.errors import BadMetadata, TextError
from stepgguf.reference.token_rows import PADDING, TokenRows

BEGIN = 0
LENGTH = 64
QUESTION = {"role": "user", "content": "What is 2 + 3?"}
ANSWER = {"role": "assistant", "reasoning_content": "2 + 3 = 5.", "content": "5"}


@pytest.fixture(scope="module")
def reader() -> Iterator[TextReader]:
    with open_source(CHECKPOINT) as source:
        yield TextReader(source, LENGTH)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder((CHECKPOINT / "tokenizer.json").read_text())


def write_chats(path: Path, *chats: Any) -> Path:
    path.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    return path


def documents(rows: TokenRows) -> list[list[int]]:
    """The tokens of each document."""
    found = []
    for tokens, numbers in zip(rows.tokens, rows.documents, strict=True):
        found += [tokens[numbers == number].tolist() for number in range(numbers.max() + 1)]
    return found


def test_plain_text_is_cut_as_llama_imatrix_cuts_it(reader: TextReader, encoder: Encoder, tmp_path: Path) -> None:
    """Its first token is bos; then every 64th becomes bos; what is left, and the last newline, is dropped."""
    text = "The cat sat on the mat, and 12 mice laughed. " * 9
    (tmp_path / "a.txt").write_text(text + "\n")
    tokens = [BEGIN, *encoder.encode(text)]
    rows = reader.read([tmp_path / "a.txt"])
    n = len(tokens) // LENGTH
    assert n > 2
    assert len(tokens) % LENGTH
    expected = np.array(tokens[: n * LENGTH]).reshape(n, LENGTH)
    expected[:, 0] = BEGIN
    assert np.array_equal(rows.tokens, expected)
    assert not rows.documents.any()


def test_a_dialogue_is_the_models_own_rendering_with_its_reasoning(
    reader: TextReader, encoder: Encoder, tmp_path: Path
) -> None:
    path = write_chats(tmp_path / "chats.jsonl", {"messages": [QUESTION, ANSWER]})
    template = ChatTemplate((CHECKPOINT / "chat_template.jinja").read_text())
    text = template.render([QUESTION, ANSWER], add_generation_prompt=False)
    assert "<think>\n2 + 3 = 5.\n</think>" in text
    assert documents(reader.read([path])) == [[BEGIN, *encoder.encode(text)]]


def test_tools_are_offered_and_arguments_may_be_json_text(reader: TextReader, tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
    messages = [
        QUESTION,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "5"},
    ]
    with open_source(CHECKPOINT) as source:
        wide = TextReader(source, 2048)
    plain = wide.read([write_chats(tmp_path / "a.jsonl", {"messages": messages})])
    offered = wide.read([write_chats(tmp_path / "b.jsonl", {"messages": messages, "tools": [tool]})])
    assert 0 < plain.n_tokens < offered.n_tokens


def test_dialogues_share_rows_and_long_ones_are_cut(reader: TextReader, encoder: Encoder, tmp_path: Path) -> None:
    chats = [{"messages": [{"role": "user", "content": "ab, " * n + "c"}]} for n in (2, 200, 1, 3)]
    rows = reader.read([write_chats(tmp_path / "chats.jsonl", *chats)])
    found = documents(rows)
    assert all(document[0] == BEGIN for document in found)
    assert rows.n_rows < len(found)
    whole = [token for document in found for token in document[1:]]
    template = ChatTemplate((CHECKPOINT / "chat_template.jinja").read_text())
    texts = [template.render(chat["messages"], add_generation_prompt=False) for chat in chats]
    assert sorted(whole) == sorted(token for text in texts for token in encoder.encode(text))


def test_documents_go_where_there_is_room() -> None:
    rows = pack_documents([[1] * 5, [2] * 7, [3] * 4, [4] * 3, [5]], 10)
    assert rows.tokens.tolist() == [[1, 1, 1, 1, 1, 3, 3, 3, 3, 5], [2] * 7 + [4] * 3]
    assert rows.documents.tolist() == [[0] * 5 + [1] * 4 + [2], [0] * 7 + [1] * 3]
    assert pack_documents([[1, 2]], 4).documents.tolist() == [[0, 0, PADDING, PADDING]]


def test_rows_of_several_texts_alternate(reader: TextReader, tmp_path: Path) -> None:
    """So that the first part of all rows has something of each text."""
    for name, letter, n in (("a.txt", "a", 1200), ("b.txt", "b", 300)):
        (tmp_path / name).write_text(letter * n)
    a, b = (reader.read([tmp_path / name]) for name in ("a.txt", "b.txt"))
    both = reader.read([tmp_path / "a.txt", tmp_path / "b.txt"])
    is_b = (both.tokens[:, 1] == b.tokens[0, 1]).tolist()
    assert (a.n_rows, b.n_rows) == (18, 4)
    assert is_b.count(True) == 4
    quarter = len(is_b) // 4
    assert any(is_b[:quarter])
    assert any(is_b[-quarter:])


def test_a_gguf_gives_the_rows_of_its_checkpoint(reader: TextReader, demo_gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Two words, 3 more.\n" * 40)
    paths = [tmp_path / "a.txt", write_chats(tmp_path / "chats.jsonl", {"messages": [QUESTION, ANSWER]})]
    expected = reader.read(paths)
    with open_source(demo_gguf) as source:
        found = TextReader(source, LENGTH).read(paths)
    assert np.array_equal(found.tokens, expected.tokens)
    assert np.array_equal(found.documents, expected.documents)


def test_the_default_texts_are_many_kinds_and_can_be_read() -> None:
    names = [path.name for path in default_texts()]
    assert names == ["code.txt", "dialogues.jsonl", "mathematics.txt", "prose-english.txt", "prose-languages.txt"]
    with open_source(CHECKPOINT) as source:
        rows = TextReader(source, 512).read(default_texts())
    assert rows.n_tokens > 100_000
    assert rows.n_tokens > 0.95 * rows.tokens.size  # little padding


GOOD = json.dumps({"messages": [QUESTION]}).encode()


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("latin.txt", "é".encode("latin-1") * 99, r"latin\.txt: not UTF-8 text, byte 0 is 0xe9"),
        ("empty.txt", b"", r"empty\.txt: the file is empty"),
        ("short.txt", b"2+3", r"short\.txt: 4 tokens, and a chunk has 64 tokens"),
        ("empty.jsonl", b" \n\n", r"empty\.jsonl: no dialogues"),
        ("bad.jsonl", GOOD + b"\n{", r"bad\.jsonl: line 2: not valid JSON"),
        ("latin.jsonl", GOOD + b'\n"\xe9"', r"latin\.jsonl: line 2: not valid JSON \(byte 1 is not UTF-8\)"),
        ("list.jsonl", b"[1]", r"list\.jsonl: line 1: the document is a list of 1, expected a JSON object"),
        ("none.jsonl", b'{"messages": []}', r"line 1: messages is a list of 0, expected at least one message"),
        ("role.jsonl", b'{"messages": [{"content": "x"}]}', r"line 1: key 'role' is missing in messages\[0\]"),
        ("tools.jsonl", b'{"messages": [{"role": "user"}], "tools": {}}', r"line 1: tools is an object of 0 members"),
    ],
)
def test_files_that_cannot_be_used_are_named(
    name: str, data: bytes, message: str, reader: TextReader, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(TextError, match=message):
        reader.read([tmp_path / name])


def with_template(gguf: Path, folder: Path, template: str) -> Path:
    """The file with another chat template."""
    copy, new = folder / "copy.gguf", folder / "new.jinja"
    copy.write_bytes(gguf.read_bytes())
    new.write_text(template)
    assert main(["template", str(copy), str(new)]) == 0
    return copy


def test_a_dialogue_that_the_template_refuses_is_named(demo_gguf: Path, tmp_path: Path) -> None:
    refusing = "{% for m in messages %}{% if 'secret' in m.content %}{{ raise_exception('no secrets') }}{% endif %}"
    path = with_template(demo_gguf, tmp_path, refusing + "{{ m.role }}{{ m.content }}{% endfor %}")
    secret = {"messages": [{"role": "user", "content": "a secret"}]}
    chats = write_chats(tmp_path / "c.jsonl", {"messages": [QUESTION]}, secret)
    with open_source(path) as source, pytest.raises(TextError, match=r"c\.jsonl: line 2: .*no secrets"):
        TextReader(source, LENGTH).read([chats])


def test_a_model_without_a_template_reads_plain_texts_only(demo_gguf: Path, tmp_path: Path) -> None:
    with open_source(demo_gguf) as source:
        del source.keys["tokenizer.chat_template"]  # type: ignore[attr-defined]
        reader = TextReader(source, LENGTH)
    (tmp_path / "a.txt").write_text("x" * 200)
    assert reader.read([tmp_path / "a.txt"]).n_rows == 3
    with pytest.raises(BadMetadata, match=r"demo\.gguf: c\.jsonl has dialogues, and the model has no chat template"):
        reader.read([write_chats(tmp_path / "c.jsonl", {"messages": [QUESTION]})])
