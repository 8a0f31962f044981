"""Sizes as text."""

from __future__ import annotations

import pytest

from stepgguf.cli.arguments import parse_size
from stepgguf.files.byte_sizes import GIB, KIB, MIB, readable_size, size_word


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (KIB, "1.00 KiB"),
        (9.5 * MIB, "9.50 MiB"),
        (10 * MIB, "10.0 MiB"),
        (1.625 * GIB, "1.62 GiB"),
        (103.84 * GIB, "103.8 GiB"),
    ],
)
def test_a_size_is_shown_in_the_largest_unit_that_it_fills(n_bytes: float, text: str) -> None:
    assert readable_size(n_bytes) == text


@pytest.mark.parametrize("text", ["104GiB", "109.1GiB", "512MiB"])
def test_a_size_in_one_word_is_what_options_take(text: str) -> None:
    assert size_word(parse_size(text)) == text
