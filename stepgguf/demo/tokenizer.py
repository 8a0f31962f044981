"""The embedded model's tokenizer: byte-level BPE in the published layout, with single letters inside words.

A model that is to count letters must see them, and one that is to add must see digits. So merges exist only at the
start of a pre-token and never of one that starts with a lower-case letter or a digit: " many" is one token,
" strawberry" is " s", "t", "r", "a", ... unless a phrase of the training text begins with the same letters. Ids as
in the published model: 0 bos, 1 end of sentence (padding), 2 pad, then bytes, then merges, then the protocol's
special tokens at the end.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers

from stepgguf.calibration.tokenizer import pre_tokenizer as pre_tokenizer

BOS, END_OF_SENTENCE, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
PROTOCOL = (
    "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>",
    "<think>", "</think>",
)  # fmt: skip

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())  # the characters that stand for the 256 bytes
N_FIXED = 3 + len(ALPHABET) + len(PROTOCOL)  # ids of every vocabulary


def build_tokenizer(texts: Iterable[str], vocab_size: int) -> str:
    """The text of tokenizer.json: `vocab_size` ids, merges chosen greedily by frequency in `texts`."""
    pre = pre_tokenizer()
    words: Counter[str] = Counter()
    for text in texts:
        for special in (BOS, *PROTOCOL):
            text = text.replace(special, "\x00")
        for part in text.split("\x00"):
            words.update(word for word, _ in pre.pre_tokenize_str(part))

    merges = _prefix_merges(words, vocab_size - N_FIXED)
    return tokenizer_json(merges)


def tokenizer_json(merges: list[tuple[str, str]]) -> str:
    """The text of tokenizer.json with these merges: N_FIXED ids and one for each merge that makes a new token."""
    made = dict.fromkeys(a + b for a, b in merges)
    tokens = [BOS, END_OF_SENTENCE, PAD, *ALPHABET, *made, *PROTOCOL]
    ids = {token: i for i, token in enumerate(tokens)}
    added = [
        {"id": ids[t], "content": t, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": t not in PROTOCOL[2:]}
        for t in (BOS, END_OF_SENTENCE, PAD, *PROTOCOL)
    ]  # fmt: skip
    document = json.loads(Tokenizer.from_str(json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": json.loads(pre_tokenizer().__getstate__()), "post_processor": _prepend_bos(),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": {t: i for t, i in ids.items() if t not in PROTOCOL},
                  "merges": [list(m) for m in merges]},
    })).to_str())  # fmt: skip
    return json.dumps(document, ensure_ascii=False, indent=1)


def _prefix_merges(words: Counter[str], n: int) -> list[tuple[str, str]]:
    """BPE training in which only the first pair of a pre-token may merge. Ties go to the smaller pair."""
    spaced = Counter({"Ġ" + letter: 10**9 for letter in "abcdefghijklmnopqrstuvwxyz"})  # always wanted
    split = {word: (word[0], word[1:]) for word in [*words, *spaced] if not (word[0].islower() or word[0].isdigit())}
    weight = words + spaced
    merges: list[tuple[str, str]] = []
    while len(merges) < n:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, (head, rest) in split.items():
            if rest:
                pairs[head, rest[0]] += weight[word]
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for word, (head, rest) in split.items():
            if rest and (head, rest[0]) == best:
                split[word] = (head + rest[0], rest[1:])
    return merges


def _prepend_bos() -> dict[str, Any]:
    bos = {"SpecialToken": {"id": BOS, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [bos, {"Sequence": {"id": "A", "type_id": 0}}, bos, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {BOS: {"id": BOS, "ids": [0], "tokens": [BOS]}},
    }
