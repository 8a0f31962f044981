"""Bounds of numbers hold to the last digit."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepgguf.chat.request import JsonSchema
from stepgguf.errors import BadGrammar
from tests.grammar.walk import MANY_EXAMPLES, GrammarVocabulary, accepts, constrained

pytestmark = pytest.mark.slow


def bounds() -> st.SearchStrategy[dict[str, Any]]:
    value = st.one_of(
        st.integers(-1200, 1200), st.decimals(-30, 30, places=2).map(float), st.sampled_from([10**20, 1e22])
    )
    keys = ["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"]
    return st.dictionaries(st.sampled_from(keys), value, min_size=1, max_size=3)


def about(limits: dict[str, Any]) -> st.SearchStrategy[Decimal]:
    near = st.sampled_from([Decimal(str(v)) for v in limits.values()])
    step = st.sampled_from([Decimal(s) for s in ("0", "0.01", "-0.01", "0.1", "1", "-1", "9", "-0.001", "100")])
    return st.one_of(st.builds(lambda a, b: a + b, near, step), st.decimals(-1300, 1300, places=3))


@MANY_EXAMPLES
@given(st.data())
def test_bounds_of_numbers_are_exact(vocab: GrammarVocabulary, data: st.DataObject) -> None:
    limits = data.draw(bounds())
    kind = data.draw(st.sampled_from(["integer", "number"]))
    schema = {"type": kind, **limits}
    numbers = [data.draw(about(limits)) for _ in range(8)]
    texts = [f"{int(n)}" if kind == "integer" else f"{n:f}" for n in numbers]
    texts = [text for text in texts if len(text.partition(".")[0]) <= 20 and not re.fullmatch(r"-0(\.0*)?", text)]
    valid = [all(_holds(key, Decimal(text), Decimal(str(bound))) for key, bound in limits.items()) for text in texts]
    try:
        grammar = constrained(JsonSchema(schema))
    except BadGrammar:
        assert not any(valid)
    else:
        assert [accepts(vocab, grammar, text) for text in texts] == valid


def _holds(key: str, value: Decimal, bound: Decimal) -> bool:
    above = value > bound if key == "exclusiveMinimum" else value >= bound
    below = value < bound if key == "exclusiveMaximum" else value <= bound
    return above if key.endswith("inimum") else below
