"""A pattern's grammar matches what the regular expression does: compared with Python's."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepgguf.chat.request import JsonSchema
from stepgguf.grammar.gbnf import GrammarRules
from stepgguf.grammar.pattern import translate_pattern
from tests.grammar.walk import MANY_EXAMPLES, GrammarVocabulary, accepts, constrained

pytestmark = pytest.mark.slow

PATTERNS = [
    "^[a-z]{2,5}$",
    "abc",
    "^abc",
    "abc$",
    "^a|b$",
    "^(a|bc)*d?$",
    "^[^a-c]+$",
    r"^\d{3}-\d{4}$",
    r"^\w+\s\S+$",
    "^.{1,3}$",
    r"^[A-Z][\w.-]*$",
    "^$",
    "",
    r'^"\\$',
    r"^[\x41-\x43\u00e9]+?$",
    "^(?:x(?:y|z)+){2}$",
    r"^[]a]$".replace("[]a]", r"[\]a]"),
    r"^\t\/[-+]$",
    "^(a|)b$",
    "^a{0}b$",
    "^é+$",
]


@pytest.mark.parametrize("pattern", PATTERNS)
@MANY_EXAMPLES
@given(st.data())
def test_patterns_match_as_regular_expressions(vocab: GrammarVocabulary, pattern: str, data: st.DataObject) -> None:
    near = st.from_regex(re.compile(pattern, re.ASCII))
    text = data.draw(st.one_of(near, near.map(lambda t: t + "a"), st.text('abcxyz19 -."\\\t\n]éZ', max_size=6)))
    if "<" in text:
        return  # a special token's text would be that token
    if not text.isascii() and "é" not in pattern:
        return  # what \w and \s mean there depends on the engine
    if "\r" in text and "." in pattern:
        return  # the dot of ECMA-262, which JSON Schema means, excludes it, and Python's does not
    escaped = json.dumps(text, ensure_ascii=False)
    expected = re.search(pattern.replace("$", r"\Z"), text, re.ASCII) is not None
    if "\\u" in escaped:
        return  # control characters are written as escapes, which a pattern does not know
    assert accepts(vocab, constrained(JsonSchema({"type": "string", "pattern": pattern})), escaped) == expected


@pytest.mark.parametrize("pattern", ["^(a{0,2000}){0,2000}$", "^(a?){2000}$", "^((a?b?){30}){30}$"])
def test_a_pattern_that_repeats_what_may_be_empty_very_often_is_refused(pattern: str) -> None:
    # `(a{0,2000}){0,2000}` is a repetition of an empty-able symbol; llama.cpp was busy for more than 90 seconds
    with pytest.raises(ValueError, match="repetitions of what may be empty"):
        translate_pattern(pattern, GrammarRules("x"))


def test_a_pattern_that_repeats_what_may_be_empty_sometimes_is_not() -> None:
    translate_pattern("^(a?b?){20}([a-z]{1,63}[.]){1,100}$", GrammarRules("x"))
