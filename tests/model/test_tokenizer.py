"""The vocabulary: every token at its id, and what llama.cpp would end the process over is refused."""

from __future__ import annotations

from typing import Any

import pytest

from stepgguf.errors import BadConfig
from stepgguf.files.jsonread import Value
from stepgguf.model.tokenizer import CONTROL, NORMAL, UNUSED, USER_DEFINED, Vocabulary, read_vocabulary


def read(size: int = 6, model: dict[str, Any] | None = None, added: Any = None) -> Vocabulary:
    whole = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]} | (model or {})
    return read_vocabulary(Value({"model": whole, "added_tokens": added}, "tokenizer.json", BadConfig), size)


def test_tokens_types_and_merges() -> None:
    added = [{"id": 3, "content": "<|x|>"}, {"id": 4, "content": "<y>", "special": True}, {"id": 5, "content": "z"}]
    found = read(8, {"merges": ["a b", ["a", "b"]]}, added)
    assert found.tokens == ("a", "b", "ab", "<|x|>", "<y>", "z", "[PAD6]", "[PAD7]")
    assert found.types == (NORMAL, NORMAL, NORMAL, CONTROL, CONTROL, USER_DEFINED, UNUSED, UNUSED)
    assert found.merges == ("a b", "a b")
    assert found.token_id("ab") == 2
    assert found.token_id("c") is None


@pytest.mark.parametrize(
    ("model", "added", "text"),
    [
        ({"vocab": {"a": "0"}}, None, r"model\.vocab: the id of 'a' is '0', no number"),
        ({"vocab": {"a": True}}, None, "the id of 'a' is True"),
        ({"vocab": {"a": 1.0}}, None, r"the id of 'a' is 1\.0"),
        ({"vocab": {"a": -1}}, None, "the id of 'a' is -1"),
        ({"vocab": {"a": 0, "b": 0}}, None, "'b' and 'a' have id 0"),
        ({"vocab": {"a": 6}}, None, "token id 6 does not fit config.json's vocab_size 6"),
        ({"vocab": {"a": 10**30}}, None, "does not fit config.json's vocab_size"),
        ({"vocab": ["a"]}, None, r"model\.vocab is a list of 1, expected a JSON object"),
        ({"type": "Unigram"}, None, r"model\.type is 'Unigram', expected BPE"),
        ({"merges": ["a"]}, None, r"model\.merges\[0\] is 'a', expected two parts"),
        ({"merges": [["a", 1]]}, None, r"model\.merges\[0\] is a list of 2, expected two parts"),
        ({"merges": {"a": "b"}}, None, r"model\.merges is an object of 1 members, expected a list"),
        ({}, [{"id": "3", "content": "x"}], r"added_tokens\[0\]\.id is '3', expected an integer"),
        ({}, [{"id": 3}], r"key 'content' is missing in added_tokens\[0\]"),
        ({}, [7], r"added_tokens\[0\] is 7, expected a JSON object"),
        ({}, [{"id": 3, "content": "a"}], "'a' is the token of two ids"),
        ({}, [{"id": 3, "content": "x", "special": "yes"}], r"added_tokens\[0\]\.special is 'yes', expected true or"),
    ],
)
def test_what_cannot_be_a_vocabulary_is_named(model: dict[str, Any], added: Any, text: str) -> None:
    with pytest.raises(BadConfig, match=rf"^tokenizer\.json: .*{text}|^tokenizer\.json: {text}"):
        read(6, model, added)
