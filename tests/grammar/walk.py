"""llama.cpp's own grammar engine over the embedded model's vocabulary, to ask what a grammar allows."""

from __future__ import annotations

import ctypes
import random
from pathlib import Path
from typing import Any

import llama_cpp
from hypothesis import HealthCheck, settings

from stepgguf.chat.answer_grammar import constrain_answer
from stepgguf.chat.output import Markers
from stepgguf.chat.request import AnswerFormat, Tool, ToolChoice
from stepgguf.runtime.engine import Grammar

MARKERS = Markers(end_of_reasoning=767, call=762, end_of_call=763)
MANY_EXAMPLES = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
LINKED_LIST = {
    "type": "object",
    "properties": {"v": {"type": "integer"}, "next": {"$ref": "#/$defs/node"}},
    "required": ["v"],
}


class GrammarVocabulary:
    """The embedded model's, with llama.cpp's grammar sampler over it."""

    def __init__(self, path: Path) -> None:
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = True
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        self.handle = llama_cpp.llama_model_get_vocab(self._model)
        n = llama_cpp.llama_vocab_n_tokens(self.handle)
        self.pieces = [self._piece(i) for i in range(n)]
        self.end = next(i for i in range(n) if llama_cpp.llama_vocab_is_eog(self.handle, i))
        self.words = [i for i in range(n) if not llama_cpp.llama_vocab_is_eog(self.handle, i)]

    def _piece(self, token_id: int) -> bytes:
        buffer = ctypes.create_string_buffer(64)
        n = llama_cpp.llama_token_to_piece(self.handle, token_id, buffer, 64, 0, True)
        return buffer.raw[:n]

    def tokenize(self, text: str) -> list[int]:
        data = text.encode()
        buffer = (llama_cpp.llama_token * (len(data) + 2))()
        n = llama_cpp.llama_tokenize(self.handle, data, len(data), buffer, len(data) + 2, False, True)
        return list(buffer[:n])


class GrammarWalk:
    """One generation under a grammar."""

    def __init__(self, vocab: GrammarVocabulary, gbnf: str, root: str = "root") -> None:
        self._vocab = vocab
        self._sampler = llama_cpp.llama_sampler_init_grammar(vocab.handle, gbnf.encode(), root.encode())
        assert self._sampler, f"llama.cpp refuses\n{gbnf}"

    def __enter__(self) -> GrammarWalk:
        return self

    def __exit__(self, *_: object) -> None:
        llama_cpp.llama_sampler_free(self._sampler)

    def allowed(self, ids: list[int]) -> list[int]:
        data = (llama_cpp.llama_token_data * len(ids))(*(llama_cpp.llama_token_data(i, 0.0, 0.0) for i in ids))
        array = llama_cpp.llama_token_data_array(data, len(ids), -1, False)
        llama_cpp.llama_sampler_apply(self._sampler, ctypes.byref(array))
        return [entry.id for entry in data if entry.logit == 0.0]

    def may_end(self) -> bool:
        return bool(self.allowed([self._vocab.end]))

    def accept(self, token_id: int) -> bool:
        if not self.allowed([token_id]):
            return False
        llama_cpp.llama_sampler_accept(self._sampler, token_id)
        return True

    def accepts(self, ids: list[int]) -> bool:
        return all(self.accept(i) for i in ids) and self.may_end()

    def random(self, rng: random.Random, phrases: tuple[str, ...], limit: int = 3000) -> list[int]:
        """Tokens that are allowed, drawn at random; phrases lead to an end."""
        ids: list[int] = []
        words = [self._vocab.tokenize(phrase) for phrase in phrases]
        everything = self._vocab.words
        while len(ids) < limit:
            if self.may_end() and rng.random() < 0.6:
                return ids
            word = rng.choice(words) if rng.random() < 0.7 else []
            for token_id in word:
                if not self.accept(token_id):
                    break
                ids.append(token_id)
            if not word:
                options = self.allowed(rng.sample(everything, 200)) or self.allowed(everything)
                if options:
                    ids.append(rng.choice(options))
                    assert self.accept(ids[-1])
                else:
                    assert self.may_end(), "a dead end"
        return []


def constrained(format: AnswerFormat | None = None, *tools: Tool, **others: Any) -> Grammar:
    """The grammar of an answer, as it holds after the reasoning."""
    options: dict[str, Any] = {"choice": ToolChoice(), "parallel": True, "in_reasoning": True, **others}
    grammar = constrain_answer(MARKERS, format=format, tools=tools, **options)
    assert grammar is not None
    return grammar


def accepts(vocab: GrammarVocabulary, grammar: Grammar, text: str, root: str = "root") -> bool:
    with GrammarWalk(vocab, grammar.gbnf, root) as walk:
        return walk.accepts(vocab.tokenize(text))
