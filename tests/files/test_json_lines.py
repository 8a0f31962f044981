"""JSON lines that survive a cut: what was whole is read, and a file can be gone on with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stepgguf.errors import OutputError
from stepgguf.files.json_lines import LineWriter, read_lines

RECORDS: list[dict[str, Any]] = [{"a": 1}, {"text": "Ġ｜▁é\n"}, {}, {"a": [None, 2.5]}]


def append(path: Path, *records: dict[str, Any]) -> None:
    lines = LineWriter(path.open("ab"))
    lines.append(*records)
    lines.close()


def parsed(path: Path) -> list[Any]:
    found = []
    for line in read_lines(path):
        try:
            found.append(line.parse(OutputError).raw)
        except OutputError as error:
            found.append(error.message)
    return found


def test_what_is_appended_is_read_back(tmp_path: Path) -> None:
    append(tmp_path / "x", *RECORDS[:2])
    append(tmp_path / "x", *RECORDS[2:])
    assert parsed(tmp_path / "x") == RECORDS


def test_a_cut_anywhere_costs_the_last_line_alone(tmp_path: Path) -> None:
    append(tmp_path / "whole", *RECORDS)
    whole = (tmp_path / "whole").read_bytes()
    for n in range(1, len(whole)):
        path = tmp_path / "cut"
        path.write_bytes(whole[:n])
        n_whole = whole[:n].count(b"\n")
        append(path, {"new": True})
        lines = parsed(path)
        assert lines[:n_whole] == RECORDS[:n_whole]
        assert lines[-1] == {"new": True}
        assert len(lines) - n_whole in (1, 2)


def test_a_line_without_its_end_says_so(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b'{"a": 1}\n\n  \n{"a": 2')
    assert [(line.number, line.is_whole) for line in read_lines(tmp_path / "x")] == [(1, True), (4, False)]
    assert "x: line 4: not valid JSON" in parsed(tmp_path / "x")[1]


@pytest.mark.parametrize("content", [b"", b"\n", b"\n{}\n"])
def test_there_is_always_a_first_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(content)
    assert read_lines(tmp_path / "x")[0].data == b""


def test_half_of_a_surrogate_pair_is_a_question_mark(tmp_path: Path) -> None:
    append(tmp_path / "x", {"text": "a\ud800b"})
    assert parsed(tmp_path / "x") == [{"text": "a?b"}]
