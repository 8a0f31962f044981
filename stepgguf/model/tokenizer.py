"""The vocabulary as GGUF wants it, from a parsed tokenizer.json.

Byte-level BPE ("gpt2" in llama.cpp) with DeepSeek-V3's pre-tokenizer. The pre-tokenizer is set by architecture and not
by hashing what a tokenizer makes of a test string: newer transformers versions change the hash.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from stepgguf.errors import BadConfig
from stepgguf.files.jsonread import Value, shown

TOKENIZER_MODEL = "gpt2"
PRE_TOKENIZER = "deepseek-v3"
# How that pre-tokenizer cuts a text into words, one after the other (llama-vocab.cpp, the published tokenizer.json).
SPLITS = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # llama.cpp's token types


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """tokens[i] is the text of id i, types[i] its llama.cpp token type; merges are "left right"."""

    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...]

    def token_id(self, token: str) -> int | None:
        """The id of a token's text; None if no token has it."""
        return self.tokens.index(token) if token in self.tokens else None


def read_vocabulary(tokenizer: Value, vocab_size: int) -> Vocabulary:
    """Read a parsed tokenizer.json. Ids without a token, up to vocab_size, become unused [PADn] tokens.

    BadConfig for another kind of tokenizer, and where one id has two tokens or one token two ids: llama.cpp ends the
    process over those.
    """
    model = tokenizer["model"]
    model_type = model.get("type")
    if model_type is not None and model_type.raw != "BPE":
        raise model_type.wrong("BPE: Step-3.x models have a byte-level BPE tokenizer")
    by_id: dict[int, tuple[str, int]] = {}
    for token, i in model["vocab"].object().items():
        if type(i) is not int or i < 0:
            raise BadConfig(f"{tokenizer.document}: model.vocab: the id of {shown(token)} is {shown(i)}, no number")
        if i in by_id:
            raise BadConfig(f"{tokenizer.document}: model.vocab: {shown(token)} and {shown(by_id[i][0])} have id {i}")
        by_id[i] = token, NORMAL
    added = tokenizer.get("added_tokens")
    by_id |= dict(_added_token(token) for token in (added.array() if added is not None else []))
    if by_id and max(by_id) >= vocab_size:
        raise BadConfig(
            f"{tokenizer.document}: token id {max(by_id)} does not fit config.json's vocab_size {vocab_size}"
        )
    entries = [by_id.get(i, (f"[PAD{i}]", UNUSED)) for i in range(vocab_size)]
    tokens = tuple(token for token, _ in entries)
    if len(set(tokens)) < vocab_size:
        repeated = next(token for token, n in Counter(tokens).items() if n > 1)
        raise BadConfig(f"{tokenizer.document}: {shown(repeated)} is the token of two ids")
    return Vocabulary(tokens, tuple(token_type for _, token_type in entries), _read_merges(model["merges"]))


def _read_merges(merges: Value) -> tuple[str, ...]:
    """Each merge as "left right", which newer versions write as ["left", "right"]."""
    found = []
    for i, merge in enumerate(merges.raw if isinstance(merges.raw, list) else merges.array()):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair)):
            raise BadConfig(f"{merges.document}: {merges.place}[{i}] is {shown(merge)}, expected two parts of a token")
        found.append(" ".join(pair))
    return tuple(found)


def _added_token(token: Value) -> tuple[int, tuple[str, int]]:
    """An added token's id, text and type.

    Control tokens are matched only where the caller says so; some are not marked special but look it.
    """
    text = token["content"].text()
    looks = (text.startswith("<|") and text.endswith("|>")) or (text.startswith("<｜") and text.endswith("｜>"))
    special = token.get("special")
    is_control = looks or (special is not None and special.flag())
    return token["id"].integer(), (text, CONTROL if is_control else USER_DEFINED)
