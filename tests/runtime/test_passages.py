"""Texts of any length are tokenized as llama.cpp would, and none ends the process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from stepgguf.demo import CHECKPOINT
from stepgguf.runtime import passages as module
from stepgguf.runtime.llama.model import LlamaModel
from stepgguf.runtime.passages import MOST_BRACKETS, MOST_CHARACTERS, passages
from stepgguf.runtime.placement import Placement

pytestmark = pytest.mark.slow

WORDS = st.sampled_from(
    ["foo", "Déjà", "don't", " ", "  ",
     "\n", " \n", "12345", "x1", "中文", "，", "ア・イ", "é", "(", "){", '":', "<", "</", "!a",
     "=", "_", "|", "-", "<|im_end|>", "<think>", "</think>", "<tool_call>", "\u3000", "½", "a\u0301", "\U0001f600"]
)  # fmt: skip


@pytest.fixture(scope="module")
def model(demo_gguf: Path) -> Iterator[LlamaModel]:
    loaded = LlamaModel(demo_gguf, Placement(), mtp=False, mmap=True, progress=None)
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def oracle() -> Tokenizer:
    return Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))


@given(text=st.lists(WORDS, max_size=200).map("".join), most=st.integers(1, 40), brackets=st.integers(1, 5))
def test_passages_are_the_text_and_are_short(text: str, most: int, brackets: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MOST_CHARACTERS", most)
        patch.setattr(module, "MOST_BRACKETS", brackets)
        parts = list(passages(text))
    assert "".join(parts) == text
    assert all(len(part) <= most and part.count("<") <= brackets for part in parts)
    assert all(parts) or parts == [""]


@settings(max_examples=300)
@given(text=st.lists(WORDS, min_size=30, max_size=200).map(lambda words: "".join(words) + " and then, some."))
def test_a_text_cut_where_words_end_has_the_tokens_of_the_whole(
    model: LlamaModel, oracle: Tokenizer, text: str
) -> None:
    """Against Hugging Face's tokenizers, which read the text whole."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MOST_CHARACTERS", 120)  # no word made of the pieces above is as long, nearly always
        assume(all(part[-1:].isalnum() for part in list(passages(text))[:-1]))
        assert model.tokenize(text, add_special=False) == oracle.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("unit", ["A", " ", "=", "\n", "1", "é", "中", "\u0301", "<", "<|", "A1", "<|im_end|>", "\0"])
def test_no_run_is_too_long(model: LlamaModel, unit: str) -> None:
    """30,000 of a kind in one call overflow a stack of 8 MiB."""
    text = unit * (200_000 // len(unit))
    ids = model.tokenize(text, add_special=False)
    assert b"".join(map(model.piece, ids)) == text.encode()


def test_special_tokens_are_whole_where_a_text_has_nothing_else(model: LlamaModel) -> None:
    n = 3 * MOST_CHARACTERS
    assert len(model.tokenize("<|im_end|>" * n, add_special=False)) == n
    assert MOST_BRACKETS < MOST_CHARACTERS
