"""A user's own GBNF grammar, made fit to stand beside ours.

All its names get a prefix, so that none of them is one of our rules; and it is refused here if it would be too much for
llama.cpp's parser or matcher.
"""

from __future__ import annotations

import re

from stepgguf.errors import BadGrammar
from stepgguf.grammar.ambiguity import find_problem
from stepgguf.grammar.gbnf import MAX_TEXT

_MAX_GROUPS = 64  # in each other: llama.cpp's parser recurses on its C stack
# strings, classes, tokens, counts and comments of GBNF, closed or not; and outside of them names and groups
_TOKENS = re.compile(
    r'"(?:\\.|[^"\\])*"?|\[(?:\\.|[^\]\\])*\]?|<[^>\n]*>?|\{[^}\n]*\}?|#[^\n]*|(?P<name>[a-zA-Z0-9-]+)|(?P<group>[()])',
    re.DOTALL,
)


def prefix_names(gbnf: str, prefix: str, param: str) -> str:
    """Return the grammar with `prefix` before every rule's name.

    BadGrammar: it has no rule `root`, or is more than llama.cpp can take. `param` is the request's field it came in.
    """
    depth = deepest = 0
    names = set()

    def rename(match: re.Match[str]) -> str:
        nonlocal depth, deepest
        if match["group"]:
            depth += 1 if match["group"] == "(" else -1
            deepest = max(deepest, depth)
        if not match["name"]:
            return match[0]
        names.add(match[0])
        return prefix + match[0]

    problem = ""
    if len(gbnf) > MAX_TEXT or re.search("[\0\ud800-\udfff]", gbnf):
        problem = f"is longer than {MAX_TEXT} characters or is no text"
    text = "" if problem else _TOKENS.sub(rename, gbnf)
    if not problem and ("root" not in names or deepest > _MAX_GROUPS):
        problem = f"has no rule `root`, or more than {_MAX_GROUPS} groups in each other"
    problem = problem or find_problem(gbnf) or ""
    if problem:
        raise BadGrammar(f"{param}: the grammar {problem}", param=param, hint="See llama.cpp's grammars/README.md.")
    return text + "\n"
