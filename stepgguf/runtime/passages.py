"""A long text in passages that can be tokenized one by one, with the tokens of the whole.

llama.cpp's pre-tokenizer recurses once for each character of a run (llama.cpp issue 26965): 26,000 letters, spaces or
signs in a row overflow a thread's stack and end the process. And finding special tokens takes time that grows with the
square of their number. So no call gets more than MOST_CHARACTERS, nor more than MOST_BRACKETS places where a special
token may start.

A passage ends where the pre-tokenizer (DeepSeek-V3's, see model/tokenizer.py) ends a word in any case: between a letter
or digit and white space, or one of the signs that special tokens such as `<|im_end|>` and `</think>` do not have there.
Only a text without such a place is cut elsewhere, before a `<` or after MOST_CHARACTERS. The tokens next to such a cut
may differ from those of the whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

MOST_CHARACTERS = 8000
MOST_BRACKETS = 256

# Places to cut, the better pattern first. Each matches up to the last of its places: `.*` takes everything and gives
# back until the rest fits.
_CUTS = (
    re.compile(r"""(?s:.*)(?<=[^\W_])(?=[ \t\r\n,;.(){}\[\]"'=+*/])"""),
    re.compile(r"(?s:.+)(?=<)"),
)


def passages(text: str) -> Iterator[str]:
    """Yield the parts of a text, in order. Together they are the text; an empty text is one part."""
    start = 0
    while (end := _longest_end(text, start)) < len(text):
        longest = text[start : end + 1]  # and the first character behind it, which a cut may look at
        cut = next((match.end() for pattern in _CUTS if (match := pattern.match(longest))), end - start)
        yield text[start : start + cut]
        start += cut
    yield text[start:]


def _longest_end(text: str, start: int) -> int:
    """Return where the longest passage ends that may start here."""
    last = min(start + MOST_CHARACTERS, len(text))
    bracket = start
    for _ in range(MOST_BRACKETS):
        bracket = text.find("<", bracket + 1, last)
        if bracket < 0:
            return last
    return bracket
