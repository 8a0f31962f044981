"""Where the grammar of an answer holds, beside and instead of free text."""

from __future__ import annotations

from pathlib import Path

import pytest

from stepgguf.chat.answer_grammar import constrain_answer
from stepgguf.chat.output import Markers
from stepgguf.chat.request import GbnfGrammar, JsonObject, JsonSchema, OneOfTexts, Tool, ToolChoice
from stepgguf.errors import BadGrammar
from tests.chat.test_call_grammar import CLOCK, WEATHER
from tests.grammar.walk import MARKERS, GrammarVocabulary, GrammarWalk, accepts, constrained


@pytest.fixture(scope="module")
def vocab(demo_gguf: Path) -> GrammarVocabulary:
    return GrammarVocabulary(demo_gguf)


CALL = "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n</tool_call>"
TIME = "<tool_call>\n<function=clock>\n</function>\n</tool_call>"


def test_without_format_and_tools_nothing_is_constrained() -> None:
    for tools, choice in [((), ToolChoice()), ((CLOCK,), ToolChoice("none"))]:
        assert not constrain_answer(MARKERS, in_reasoning=True, format=None, tools=tools, choice=choice, parallel=True)
    lacking = Markers(1, None, None)
    assert not constrain_answer(
        lacking, in_reasoning=True, format=None, tools=[CLOCK], choice=ToolChoice(), parallel=True
    )


@pytest.mark.parametrize("in_reasoning", [True, False])
def test_a_grammar_starts_where_it_must(in_reasoning: bool) -> None:
    after = ((767, "root"),) if in_reasoning else ()
    both = ((767, "root"), (762, "calls")) if in_reasoning else ()
    assert constrained(JsonObject(), in_reasoning=in_reasoning).starts == after
    assert constrained(None, CLOCK, in_reasoning=in_reasoning).starts == ((762, "calls"),)
    assert constrained(JsonObject(), CLOCK, in_reasoning=in_reasoning).starts == both
    assert constrained(None, CLOCK, in_reasoning=in_reasoning, choice=ToolChoice("required")).starts == both
    assert constrained(JsonObject(), CLOCK, in_reasoning=in_reasoning, choice=ToolChoice("none")).starts == after


def test_a_free_answer_may_call_one_or_several_tools(vocab: GrammarVocabulary) -> None:
    one = constrained(None, WEATHER, CLOCK, parallel=False)
    many = constrained(None, WEATHER, CLOCK)
    call, time_ = CALL.removeprefix("<tool_call>"), TIME.removeprefix("<tool_call>")
    for text in (call, time_, call + "\n"):
        assert accepts(vocab, one, text, "calls")
        assert accepts(vocab, many, text, "calls")
    for text in (call + TIME, call + "\n" + CALL + TIME):
        assert not accepts(vocab, one, text, "calls")
        assert accepts(vocab, many, text, "calls")
    wrong = [
        "",
        "\n",
        call[:-1],
        call.replace("city", "town"),
        call.replace("get_", ""),
        call + "x",
        time_.replace("\n", ""),
    ]
    assert not any(accepts(vocab, many, text, "calls") for text in wrong)


def test_a_call_needs_the_tokens_and_not_their_characters(vocab: GrammarVocabulary) -> None:
    call = CALL.removeprefix("<tool_call>").removesuffix("</tool_call>")
    spelled = [i for part in ("</", "tool", "_call", ">") for i in vocab.tokenize(part)]
    with GrammarWalk(vocab, constrained(None, WEATHER).gbnf, "calls") as walk:
        assert not walk.accepts(vocab.tokenize(call) + spelled)


def test_a_required_call_is_all_there_is(vocab: GrammarVocabulary) -> None:
    any_tool = constrained(JsonObject(), WEATHER, CLOCK, choice=ToolChoice("required"))
    named = constrained(None, WEATHER, CLOCK, choice=ToolChoice("required", "clock"))
    assert accepts(vocab, any_tool, "\n" + CALL)
    assert accepts(vocab, named, TIME)
    assert not accepts(vocab, named, CALL)
    assert not any(accepts(vocab, any_tool, text) for text in ("{}", "", "Hello", "\n"))


def test_with_a_format_the_answer_is_that_or_a_call(vocab: GrammarVocabulary) -> None:
    grammar = constrained(JsonSchema({"type": "integer"}), CLOCK)
    assert [accepts(vocab, grammar, text) for text in ("5", TIME, "\n" + TIME, "x", "5" + TIME)] == [True] * 3 + [
        False
    ] * 2


def test_the_line_break_after_the_reasoning_belongs_to_it(vocab: GrammarVocabulary) -> None:
    schema = JsonSchema({"type": "integer"})
    assert [
        accepts(vocab, constrained(schema, in_reasoning=in_reasoning), "\n5") for in_reasoning in (True, False)
    ] == [
        True,
        False,
    ]


def test_a_choice_is_one_of_its_texts(vocab: GrammarVocabulary) -> None:
    texts = ("yes", "yes!", "no", 'say "no"\n', "é", *("ab" * n for n in range(1, 60)))
    grammar = constrained(OneOfTexts(texts))
    assert all(accepts(vocab, grammar, text) for text in texts)
    assert not any(accepts(vocab, grammar, text) for text in ("ye", "yesno", "aba", "", "No"))


def test_a_users_grammar_keeps_its_meaning_beside_ours(vocab: GrammarVocabulary) -> None:
    own = GbnfGrammar(
        'root ::= value (ws value)*  # "root" (\nvalue ::= "value" | [a-z"root(] | <tool_call>\n'
        'ws ::= " "{1,2}\ncall ::= "x"'
    )
    for grammar in (constrained(own), constrained(own, CLOCK)):
        assert all(accepts(vocab, grammar, text) for text in ("value", "a  value", '"', "\nt"))
        assert not any(accepts(vocab, grammar, text) for text in ("VALUE", "aa", "a   a", "{}"))
    assert accepts(vocab, constrained(own, CLOCK), TIME)


def test_what_cannot_be_called_is_refused() -> None:
    for choice, tools in [(ToolChoice("required"), ()), (ToolChoice("required", "x"), (CLOCK,))]:
        with pytest.raises(BadGrammar, match="was not offered") as error:
            constrained(None, *tools, choice=choice)
        assert error.value.param == "tool_choice"
    with pytest.raises(BadGrammar, match="cannot") as error:
        constrain_answer(
            Markers(1, None, None),
            in_reasoning=True,
            format=None,
            tools=[CLOCK],
            choice=ToolChoice("required"),
            parallel=True,
        )
    with pytest.raises(BadGrammar, match="protocol") as error:
        constrained(None, CLOCK, Tool("f", "", {"type": "object", "properties": {"a>b": {}}}))
    assert error.value.param == "tools[1].function.parameters"
