"""JSON from outside: what is read is what Python's json reads, and whatever is wrong is one error with its place."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepgguf.errors import BadConfig
from stepgguf.files import jsonread
from stepgguf.files.jsonread import MAX_DEPTH, Value

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
DOCUMENTS = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=30)


def parse(text: str | bytes) -> Value:
    return jsonread.parse(text if isinstance(text, bytes) else text.encode(), "x.json", BadConfig, "Mend it.")


@pytest.mark.slow
@given(DOCUMENTS)
@settings(deadline=None)
def test_documents_are_those_that_pythons_json_reads(document: Any) -> None:
    assert parse(json.dumps(document)).raw == document
    assert parse(json.dumps(document, ensure_ascii=False)).raw == document


@given(st.binary(max_size=60) | st.text(alphabet='{}[]",:0123456789eE.-+\\\\ud8utrfalsn ', max_size=40).map(str.encode))
@settings(deadline=None)
def test_any_bytes_are_a_document_or_one_error_that_names_it(data: bytes) -> None:
    error = None
    try:
        parse(data)
    except BadConfig as caught:
        error = caught
    starts = ("x.json: not valid JSON (", "x.json: is a git-lfs pointer")
    assert error is None or (error.message.startswith(starts) and error.hint)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
        ('{"a": 1}'.encode("utf-16"), "byte 0 is not UTF-8, it looks like UTF-16"),
        (b"[\xe4]", "byte 1 is not UTF-8\\)"),
        (b'["\\ud83d"]', r"half of a surrogate pair, \\ud83d, is no text"),
        (b'{"\\uDE00": 1}', "half of a surrogate pair"),
        (b'{"a": 1, "b": 2, "a": 3}', "key 'a' is there twice"),
        (b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), f"nested more than {MAX_DEPTH} levels deep"),
        (b'{"a":' * 100_000, "nested more than"),
        (b"9" * 5000, "integer string conversion"),
    ],
)
def test_what_is_no_json_is_said(data: bytes, text: str) -> None:
    with pytest.raises(BadConfig, match=text):
        parse(data)


def test_a_git_lfs_pointer_is_named() -> None:
    with pytest.raises(BadConfig, match=r"x\.json: is a git-lfs pointer") as caught:
        parse(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert "git lfs pull" in (caught.value.hint or "")


def test_what_is_unusual_but_right_is_read() -> None:
    assert parse(b"\xef\xbb\xbf[1]").raw == [1]  # a byte order mark
    assert parse(b'"\\ud83d\\ude00"').raw == "😀"
    assert parse(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH).array()[0].place == "[0]"
    assert parse(b'{"time_step_limit": [0.0, Infinity]}').raw == {"time_step_limit": [0.0, math.inf]}


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match=r"none\.json: No such file"):
        jsonread.read(tmp_path / "none.json", BadConfig)
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(BadConfig, match=r"folder\.json: not a file"):
        jsonread.read(tmp_path / "folder.json", BadConfig)
    os.mkfifo(tmp_path / "pipe.json")  # opening it would wait for ever
    with pytest.raises(BadConfig, match=r"pipe\.json: not a file"):
        jsonread.read(tmp_path / "pipe.json", BadConfig)


def test_a_file_too_large_for_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonread, "MAX_BYTES", 10)
    (tmp_path / "x.json").write_text("[" + " " * 10 + "]")
    with pytest.raises(BadConfig, match="more than 10 bytes"):
        jsonread.read(tmp_path / "x.json", BadConfig)


DOCUMENT = parse(
    '{"n": 3, "f": 1.5, "t": "x", "yes": true, "null": null, "list": [1, {"a": "b"}], "nan": NaN, "inf": 1e999, '
    f'"big": {10**400}, "long": "{"y" * 99}"}}'
)


@pytest.mark.parametrize(
    ("ask", "text"),
    [
        (lambda d: d["absent"], "key 'absent' is missing"),
        (lambda d: d["null"], "key 'null' is missing"),
        (lambda d: d["list"].array()[1]["c"], r"key 'c' is missing in list\[1\]"),
        (lambda d: d["list"].array()[1]["a"].integer(), r"list\[1\]\.a is 'b', expected an integer of at least 0"),
        (lambda d: d["n"].integer(4, 5), "n is 3, expected an integer from 4 to 5"),
        (lambda d: d["yes"].integer(), "yes is True, expected an integer"),
        (lambda d: d["f"].integer(), r"f is 1\.5, expected an integer"),
        (lambda d: d["big"].integer(), r"big is 1000.*\(401 characters\), expected an integer"),
        (lambda d: d["yes"].number(), "yes is True, expected a finite number"),
        (lambda d: d["nan"].number(), "nan is nan, expected a finite number"),
        (lambda d: d["inf"].number(), "inf is inf, expected a finite number"),
        (lambda d: d["big"].number(), r"big is 1000.*, expected a finite number"),
        (lambda d: d["f"].number(2, 3), "f is 1.5, expected a number from 2 to 3"),
        (lambda d: d["n"].text(), "n is 3, expected a text"),
        (lambda d: d["n"].flag(), "n is 3, expected true or false"),
        (lambda d: d["t"].array(), "t is 'x', expected a list"),
        (lambda d: d["list"].object(), "list is a list of 2, expected a JSON object"),
        (lambda d: d["long"].flag(), r"long is 'yyy.*\.\.\. \(101 characters\), expected"),
    ],
)
def test_another_shape_is_an_error_with_its_place(ask: Any, text: str) -> None:
    with pytest.raises(BadConfig, match=f"^x.json: {text}"):
        ask(DOCUMENT)


def test_values_of_the_right_shape() -> None:
    assert DOCUMENT["n"].integer(3, 3) == 3
    assert DOCUMENT["n"].number() == 3.0
    assert DOCUMENT["f"].number(1, 2) == 1.5
    assert DOCUMENT["t"].text() == "x"
    assert DOCUMENT["yes"].flag() is True
    assert DOCUMENT.get("null") is None
    assert [name for name, _ in DOCUMENT.members()][:2] == ["n", "f"]
