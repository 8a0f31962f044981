"""The vocabulary as GGUF wants it, from a parsed tokenizer.json.

Byte-level BPE ("gpt2" in llama.cpp) with DeepSeek-V3's pre-tokenizer. The pre-tokenizer is set by architecture and not
by hashing what a tokenizer makes of a test string: newer transformers versions change the hash.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stepgguf.errors import BadConfig

MODEL = "gpt2"
PRE = "deepseek-v3"
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # llama.cpp's token types


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """tokens[i] is the text of id i, types[i] its llama.cpp token type; merges are "left right"."""

    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...]

    def id(self, token: str) -> int | None:
        return self.tokens.index(token) if token in self.tokens else None


def vocabulary(tokenizer: Mapping[str, Any], vocab_size: int) -> Vocabulary:
    """Read a parsed tokenizer.json. Ids without a token, up to vocab_size, become unused [PADn] tokens."""
    try:
        model = tokenizer["model"]
        vocab: dict[str, int] = dict(model["vocab"])
        merges = tuple(m if isinstance(m, str) else " ".join(m) for m in model["merges"])
        added = list(tokenizer.get("added_tokens", []))
        by_id = {i: (token, NORMAL) for token, i in vocab.items()}
        by_id |= {a["id"]: (a["content"], _added_type(a)) for a in added}
    except (KeyError, TypeError, AttributeError) as error:
        raise BadConfig(f"tokenizer.json: not a byte-level BPE tokenizer ({error!r})") from error
    if by_id and max(by_id) >= vocab_size:
        raise BadConfig(f"tokenizer.json: token id {max(by_id)} does not fit config.json's vocab_size {vocab_size}")
    entries = [by_id.get(i, (f"[PAD{i}]", UNUSED)) for i in range(vocab_size)]
    return Vocabulary(tuple(t for t, _ in entries), tuple(kind for _, kind in entries), merges)


def _added_type(token: Mapping[str, Any]) -> int:
    """Control tokens are matched only where the caller says so; some are not marked special but look it."""
    text = token["content"]
    looks = (text.startswith("<|") and text.endswith("|>")) or (text.startswith("<｜") and text.endswith("｜>"))
    return CONTROL if token.get("special") or looks else USER_DEFINED
