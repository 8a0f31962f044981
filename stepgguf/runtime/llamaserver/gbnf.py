"""GBNF with another start: llama-server always starts a grammar with the rule `root`."""

from __future__ import annotations

import re

from stepgguf.errors import BadGrammar
from stepgguf.runtime.engine import Grammar

# What can hold the word root without meaning the rule, and the rule's name itself.
_WORDS = re.compile(r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|#[^\n]*|(?<![\w-])root(?![\w-])')
_FORMER_ROOT = "former-root"


def with_start_rule(gbnf: str, rule: str) -> str:
    """Return the same grammar, starting with `rule`."""
    if rule == "root":
        return gbnf
    renamed = _WORDS.sub(lambda match: _FORMER_ROOT if match[0] == "root" else match[0], gbnf)
    return f"root ::= {rule}\n{renamed}"


def check_rules(grammar: Grammar) -> None:
    """Raise BadGrammar if a rule that it can start with is missing. Everything else llama-server finds out."""
    for rule in {rule for _, rule in grammar.starts} or {"root"}:
        if not re.search(rf"^\s*{re.escape(rule)}\s*::=", grammar.gbnf, re.MULTILINE):
            raise BadGrammar(f"the grammar has no rule {rule!r}", param="grammar")
