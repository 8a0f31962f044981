"""A user's own grammar that llama.cpp's parser cannot take does not reach it."""

from __future__ import annotations

import pytest

from stepgguf.chat.request import GbnfGrammar
from stepgguf.errors import BadGrammar
from tests.grammar.walk import constrained


def test_hostile_grammars_do_not_reach_the_parser() -> None:
    for text in ("root ::= " + "(" * 100000 + '"a"' + ")" * 100000, "x" * 300000, 'value ::= "a"', 'root ::= "\ud800"'):
        with pytest.raises(BadGrammar) as error:
            constrained(GbnfGrammar(text))
        assert error.value.param == "response_format"
