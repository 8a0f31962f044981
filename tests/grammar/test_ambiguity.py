"""Grammars that llama.cpp would be busy with for hours, in one call, are refused before it has them."""

from __future__ import annotations

import contextlib

import pytest

from stepgguf.chat.answer_grammar import constrain_answer
from stepgguf.chat.output import Markers
from stepgguf.chat.request import GbnfGrammar, ToolChoice
from stepgguf.errors import BadGrammar
from stepgguf.grammar.ambiguity import find_problem
from tests.processor_time import at_most

pytestmark = pytest.mark.slow

DOUBLING = "".join(f'a{i} ::= a{i + 1} | a{i + 1} "y"\n' for i in range(60))


@pytest.mark.parametrize(
    "gbnf",
    [
        f'root ::= a0\n{DOUBLING}a60 ::= "x"',
        'root ::= x{0,2000} "b"\nx ::= "a"?',
        'root ::= x{0,100} "b"\nx ::= "a"{0,2} "c"* y{40}\ny ::= "d"?',
        'root ::= "b" (x | "c"){2000}\nx ::= | "a"',
        'root ::= "a"{5,2}',
        'root ::= ("a" | [b]{ 5 , 2 })*',
    ],
)
def test_a_grammar_that_explodes_is_refused(gbnf: str) -> None:
    assert find_problem(gbnf)
    with pytest.raises(BadGrammar, match=r"the grammar (has|repeats)"):
        constrain_answer(
            Markers(1, 2, 3, 4),
            in_reasoning=False,
            format=GbnfGrammar(gbnf),
            tools=(),
            choice=ToolChoice("auto"),
            parallel=True,
        )


@pytest.mark.parametrize(
    "gbnf",
    [
        'root ::= ("a" [^"\\n]* "b"?){0,2000} # ((((',
        "root ::= " + " | ".join(f'"w{i}"' for i in range(5000)),
        'root ::= "{" ws (item ("," ws item)*)? "}"\nitem ::= [a-z]{1,63} | root\nws ::= | " " | "\\n" [ \\t]{0,20}',
        'root ::= root "a" | "b"',  # left-recursive: llama.cpp says so
        "root ::= (",
    ],
)
def test_other_grammars_are_not(gbnf: str) -> None:
    assert find_problem(gbnf) is None


@pytest.mark.parametrize("opened", ["[\\", '"\\', "{", "<", "a{ ", "(", "a "])
def test_what_is_never_closed_is_read_in_a_moment(opened: str) -> None:
    """It took two minutes, with the interpreter held: nobody else was answered."""
    gbnf = "root ::= " + opened * (200_000 // len(opened))
    with at_most(10), contextlib.suppress(BadGrammar):
        constrain_answer(
            Markers(1, 2, 3, 4),
            in_reasoning=False,
            format=GbnfGrammar(gbnf),
            tools=(),
            choice=ToolChoice("auto"),
            parallel=True,
        )
