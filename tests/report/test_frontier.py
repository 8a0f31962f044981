"""Results of eval as the report draws them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stepgguf.errors import EvaluationError
from stepgguf.report.frontier import read_frontier


def result(name: str, n_bytes: int, kld: float, **changes: Any) -> dict[str, Any]:
    column = {"name": "text, context 512", "tokens": "abc", "kld": {"value": kld, "error": kld / 10}}
    random = {"name": "random tokens", "tokens": "def", "kld": {"value": 2 * kld, "error": kld / 5}}
    whole = {"file": name, "is_stock": name == "big.gguf", "engine": "stream", "bytes": n_bytes, "bpw": 4.5, "top_k": 0}
    return {**whole, "columns": [column, random], **changes}


def write(folder: Path, *results: object) -> list[Path]:
    paths = [folder / f"{i}.json" for i in range(len(results))]
    for path, value in zip(paths, results, strict=True):
        path.write_text(json.dumps(value))
    return paths


def test_files_are_ordered_by_size(tmp_path: Path) -> None:
    found = read_frontier(write(tmp_path, result("big.gguf", 900, 0.01), result("small.gguf", 500, 0.2)))
    assert found == {
        "columns": ["text, context 512", "random tokens"],
        "off": 1,
        "top_k": 0,
        "engine": "stream",
        "files": [
            {"file": "small.gguf", "is_stock": False, "bytes": 500, "bpw": 4.5, "kld": [[0.2, 0.02], [0.4, 0.04]]},
            {"file": "big.gguf", "is_stock": True, "bytes": 900, "bpw": 4.5, "kld": [[0.01, 0.001], [0.02, 0.002]]},
        ],
    }
    assert read_frontier([]) is None


@pytest.mark.parametrize(
    ("second", "words"),
    [
        (result("b", 1, 1.0, top_k=64), "another --top-k"),
        (result("b", 1, 1.0, engine="llama-cpp-python"), "another --engine"),
        (result("b", 1, 1.0, columns=result("b", 1, 1.0)["columns"][::-1]), "other columns or another text"),
        (result("b", 1, 1.0, columns=[]), "other columns or another text"),
        (
            result("b", 1, 1.0, columns=[{**result("b", 1, 1.0)["columns"][0], "tokens": "abd"}]),
            "other columns or another text",
        ),
        ({"file": "b"}, "key 'columns' is missing"),
        (result("b", 1, -1.0), "columns[0].kld.error"),
        (result("b", 0, 1.0), "bytes is 0"),
    ],
)
def test_results_that_cannot_be_compared_are_refused(tmp_path: Path, second: object, words: str) -> None:
    paths = write(tmp_path, result("a", 1, 1.0), second)
    with pytest.raises(EvaluationError) as error:
        read_frontier(paths)
    assert str(paths[1]) in error.value.message
    assert words in error.value.message
