"""Grammars that llama.cpp would be busy with for hours, in one call, are refused before it has them."""

from __future__ import annotations

import contextlib
import time

import pytest

from stepgguf.chat.answer_grammar import constrain
from stepgguf.chat.output import Markers
from stepgguf.chat.request import Gbnf, ToolChoice
from stepgguf.errors import BadGrammar
from stepgguf.grammar.ambiguity import problem
from stepgguf.grammar.gbnf import Rules
from stepgguf.grammar.pattern import translate

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
    assert problem(gbnf)
    with pytest.raises(BadGrammar, match=r"the grammar (has|repeats)"):
        constrain(
            Markers(1, 2, 3, 4),
            in_reasoning=False,
            format=Gbnf(gbnf),
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
    assert problem(gbnf) is None


@pytest.mark.parametrize("opened", ["[\\", '"\\', "{", "<", "a{ ", "(", "a "])
def test_what_is_never_closed_is_read_in_a_moment(opened: str) -> None:
    """It took two minutes, with the interpreter held: nobody else was answered."""
    gbnf = "root ::= " + opened * (200_000 // len(opened))
    started = time.process_time()
    with contextlib.suppress(BadGrammar):
        constrain(
            Markers(1, 2, 3, 4),
            in_reasoning=False,
            format=Gbnf(gbnf),
            tools=(),
            choice=ToolChoice("auto"),
            parallel=True,
        )
    assert time.process_time() - started < 10


@pytest.mark.parametrize("pattern", ["^(a{0,2000}){0,2000}$", "^(a?){2000}$", "^((a?b?){30}){30}$"])
def test_a_pattern_that_repeats_what_may_be_empty_very_often_is_refused(pattern: str) -> None:
    # `(a{0,2000}){0,2000}` is a repetition of an empty-able symbol; llama.cpp was busy for more than 90 seconds
    with pytest.raises(ValueError, match="repetitions of what may be empty"):
        translate(pattern, Rules("x"))


def test_a_pattern_that_repeats_what_may_be_empty_sometimes_is_not() -> None:
    translate("^(a?b?){20}([a-z]{1,63}[.]){1,100}$", Rules("x"))
