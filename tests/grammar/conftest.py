"""The vocabulary that grammars are walked over."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.grammar.walk import GrammarVocabulary


@pytest.fixture(scope="module")
def vocab(demo_gguf: Path) -> GrammarVocabulary:
    return GrammarVocabulary(demo_gguf)
