"""The frontier of size against KL divergence: what `stepgguf eval -o` found for several files of one model.

Only figures of the same tokens, kept in the same form and of the same engine, are comparable; a column's digest says
which those are.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stepgguf.errors import EvaluationError
from stepgguf.files import jsonread
from stepgguf.files.jsonread import Value

_OFF = "random tokens"
_HINT = "Give results that `stepgguf eval ... -o RESULT.json` wrote against the same original and text."


def read_frontier(paths: Sequence[Path]) -> dict[str, Any] | None:
    """Return the results as data to draw: names of columns, and for each file its size and a KLD for each column.

    off: the number of the column of random tokens, which are unlike all text; None if there is none. Files are ordered
    by size. None if there are no results. EvaluationError for a file that is none, and for results of
    different columns, texts or forms.
    """
    results = [_read_result(path) for path in paths]
    for path, result in zip(paths, results, strict=True):
        _require_comparable(path, result, results[0])
    if not results:
        return None
    columns = [name for name, _ in results[0]["columns"]]
    return {
        "columns": columns,
        "off": columns.index(_OFF) if _OFF in columns else None,
        "top_k": results[0]["top_k"],
        "engine": results[0]["engine"],
        "files": [
            {key: result[key] for key in ("file", "is_stock", "bytes", "bpw", "kld")}
            for result in sorted(results, key=lambda result: int(result["bytes"]))
        ],
    }


def _read_result(path: Path) -> dict[str, Any]:
    found = jsonread.read(path, EvaluationError, _HINT)
    columns = found["columns"].array()
    return {
        "file": found["file"].text(),
        "is_stock": found["is_stock"].flag(),
        "engine": found["engine"].text(),
        "bytes": found["bytes"].integer(1),
        "bpw": found["bpw"].number(0),
        "top_k": found["top_k"].integer(),
        "columns": [(column["name"].text(), column["tokens"].text()) for column in columns],
        "kld": [_estimate(column["kld"]) for column in columns],
    }


def _estimate(value: Value) -> list[float]:
    return [value["value"].number(), value["error"].number(0)]


def _require_comparable(path: Path, result: dict[str, Any], first: dict[str, Any]) -> None:
    for what, name in (
        ("columns", "other columns or another text"),
        ("top_k", "another --top-k"),
        ("engine", "another --engine"),
    ):
        if result[what] != first[what]:
            raise EvaluationError(f"{path}: {name} than the first result", hint=_HINT)
