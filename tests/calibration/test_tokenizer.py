"""Token ids against llama.cpp's, and against the checkpoint's own tokenizer.json."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
from gguf import GGUFValueType
from tokenizers import Tokenizer

from stepgguf.calibration.text import default_texts
from stepgguf.calibration.tokenizer import TextTokenizer
from stepgguf.errors import BadMetadata
from stepgguf.files import gguf_header
from stepgguf.files.gguf_header import Key
from tests.conftest import CHECKPOINT

V = GGUFValueType
ODD = (
    "",
    " ",
    "a <|im_start|>user\n<think> hi </think>  <tool_call>\r\n\n",
    "<｜begin▁of▁sentence｜>x[PAD1] <|im_end|><|im_end|>",
    "Ünïcödé 汉字かなカナ 1234567 \t  end  ",
    "don't 'S 12,345.67 — “quotes” ... !!!\n\n\n  x",
    "👩‍🚀 नमस्ते שָׁלוֹם สวัสดี",
)


class Vocabulary:
    """llama.cpp's own, of a file."""

    def __init__(self, path: Path) -> None:
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = True
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)

    def tokenize(self, text: str, *, parse_special: bool) -> list[int]:
        data = text.encode()
        ids = (llama_cpp.llama_token * (len(data) + 1))()
        n = llama_cpp.llama_tokenize(self._vocab, data, len(data), ids, len(ids), False, parse_special)
        assert n >= 0
        return list(ids[:n])

    def close(self) -> None:
        llama_cpp.llama_model_free(self._model)


@pytest.fixture(scope="module")
def theirs(demo_gguf: Path) -> Iterator[Vocabulary]:
    vocabulary = Vocabulary(demo_gguf)
    yield vocabulary
    vocabulary.close()


@pytest.fixture(scope="module")
def keys(demo_gguf: Path) -> dict[str, Key]:
    return gguf_header.read(demo_gguf).keys


@pytest.fixture(scope="module")
def ours(keys: dict[str, Key]) -> TextTokenizer:
    return TextTokenizer.of_keys(keys, "demo.gguf")


def texts() -> list[str]:
    return [*ODD, *(path.read_text()[:20_000] for path in default_texts())]


@pytest.mark.parametrize("parse_special", [False, True])
def test_ids_are_llama_cpps(parse_special: bool, ours: TextTokenizer, theirs: Vocabulary) -> None:
    for text in texts():
        found = ours.tokenize(text, parse_special=parse_special)
        assert found == theirs.tokenize(text, parse_special=parse_special), text[:60]


def test_ids_are_those_of_the_checkpoints_tokenizer(ours: TextTokenizer) -> None:
    own = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    for text in texts():
        assert ours.tokenize(text, parse_special=True) == own.encode(text, add_special_tokens=False).ids, text[:60]


def test_control_tokens_are_letters_where_they_are_not_asked_for(ours: TextTokenizer) -> None:
    """But not those that the vocabulary defines as a user's: llama.cpp always looks for them."""
    for text, parsed, plain in (("<|im_start|>", 1, False), ("<think>", 1, True)):
        assert len(ours.tokenize(text, parse_special=True)) == parsed
        assert (len(ours.tokenize(text, parse_special=False)) == 1) == plain


def test_what_begins_a_text_is_known_where_the_vocabulary_adds_it(keys: dict[str, Key]) -> None:
    assert TextTokenizer.of_keys(keys, "x").begin == 0
    without = {name: key for name, key in keys.items() if name != "tokenizer.ggml.add_bos_token"}
    assert TextTokenizer.of_keys(without, "x").begin is None


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model", "llama", r"^x\.gguf: tokenizer\.ggml\.model is 'llama', expected 'gpt2'"),
        ("pre", "qwen2", r"^x\.gguf: tokenizer\.ggml\.pre is 'qwen2', expected 'deepseek-v3'"),
        ("merges", None, r"^x\.gguf: key 'tokenizer\.ggml\.merges' is missing"),
        ("bos_token_id", 10**6, r"tokenizer\.ggml\.bos_token_id is 1000000, expected an integer from 0 to 767"),
        ("tokens", "abc", r"tokenizer\.ggml\.tokens is 'abc', expected a list"),
    ],
)
def test_another_tokenizer_is_refused(name: str, value: Any, message: str, keys: dict[str, Key]) -> None:
    changed = {**keys}
    key = f"tokenizer.ggml.{name}"
    del changed[key]
    if value is not None:
        changed[key] = Key.of(key, value, V.STRING if isinstance(value, str) else V.UINT32)
    with pytest.raises(BadMetadata, match=message):
        TextTokenizer.of_keys(changed, "x.gguf")
