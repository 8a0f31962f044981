"""Text to token ids as llama.cpp makes them, by the `tokenizers` library.

    checkpoint: tokenizer.json --converted--> keys tokenizer.ggml.* <--as they are-- GGUF
    text --special tokens--> pieces --pre-tokenizer--> words --merges--> tokens

A checkpoint's tokenizer goes by way of the keys that a GGUF made of it would have: one vocabulary for both, and what
calibration sees is what the engine will read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gguf import Keys
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers

from stepgguf.errors import BadMetadata
from stepgguf.files.gguf_header import Key
from stepgguf.files.jsonread import Value
from stepgguf.model.tokenizer import CONTROL, PRE_TOKENIZER, SPLITS, TOKENIZER_MODEL, USER_DEFINED, Vocabulary

_AGAIN = "Convert the model again."
_READ = frozenset(
    {
        Keys.Tokenizer.MODEL, Keys.Tokenizer.PRE, Keys.Tokenizer.LIST, Keys.Tokenizer.TOKEN_TYPE,
        Keys.Tokenizer.MERGES, Keys.Tokenizer.ADD_BOS, Keys.Tokenizer.BOS_ID,
    }
)  # fmt: skip


@dataclass(frozen=True, eq=False, slots=True)
class TextTokenizer:
    """A model's tokenizer, of n_vocab tokens.

    begin: the id that llama.cpp puts before every text, None where it puts none; begin_text is its token, or "".
    """

    n_vocab: int
    begin: int | None
    begin_text: str
    _plain: Tokenizer
    _marked: Tokenizer

    @classmethod
    def of_keys(cls, keys: Mapping[str, Key], document: str) -> TextTokenizer:
        """The tokenizer that a GGUF's keys describe; `document` names the file in errors.

        BadMetadata for keys that are missing, and for another kind of tokenizer than Step-3 models have.
        """
        tok = Keys.Tokenizer
        said = Value({name: key.value for name, key in keys.items() if name in _READ}, document, BadMetadata, _AGAIN)
        for name, expected in ((tok.MODEL, TOKENIZER_MODEL), (tok.PRE, PRE_TOKENIZER)):
            if said[name].raw != expected:
                raise said[name].wrong(repr(expected))
        vocabulary = Vocabulary(
            tokens=tuple(token.text() for token in said[tok.LIST].array()),
            types=tuple(kind.integer() for kind in said[tok.TOKEN_TYPE].array()),
            merges=tuple(merge.text() for merge in said[tok.MERGES].array()),
        )
        adds = said.get(tok.ADD_BOS)
        begin = said[tok.BOS_ID].integer(0, len(vocabulary.tokens) - 1) if adds is not None and adds.flag() else None
        return cls(
            n_vocab=len(vocabulary.tokens),
            begin=begin,
            begin_text="" if begin is None else vocabulary.tokens[begin],
            _plain=_build(vocabulary, {USER_DEFINED}),
            _marked=_build(vocabulary, {USER_DEFINED, CONTROL}),
        )

    def tokenize(self, text: str, *, parse_special: bool) -> list[int]:
        """The ids of a text, without `begin`. parse_special: control tokens written in it become their ids."""
        tokenizer = self._marked if parse_special else self._plain
        return list(tokenizer.encode(text, add_special_tokens=False).ids)


def pre_tokenizer() -> Any:
    """The pre-tokenizer of the published tokenizer.json, as a `tokenizers` object, which has no public type."""
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in SPLITS]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _build(vocabulary: Vocabulary, matched: set[int]) -> Tokenizer:
    """A tokenizer that looks for the tokens of the types `matched` in a text before it is split."""
    ids = {token: i for i, token in enumerate(vocabulary.tokens)}
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in vocabulary.merges)]
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizer()
    tokenizer.add_tokens(
        [
            AddedToken(token, normalized=False)
            for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
            if kind in matched
        ]
    )
    return tokenizer
