"""What each type costs each tensor, as calibration has found it: a file of JSON lines, for budgets to choose types by.

    line 1      {"version", "source": identity of the source, "importance": of the imatrix or null}
    then        {"tensor": name, "costs": {type: nats}}

A cost is the KL divergence, per token, that the tensor alone is predicted to bring as that type. It holds for the
source and the importance matrix that it was made with, and for no others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gguf import GGMLQuantizationType

from stepgguf.convert.importance import Importance
from stepgguf.convert.sources.source import TensorSource
from stepgguf.errors import CostsError
from stepgguf.files import disk
from stepgguf.files.disk import disk_errors
from stepgguf.files.json_lines import LineWriter, read_lines
from stepgguf.files.jsonread import Value

TypeCosts = Mapping[str, Mapping[GGMLQuantizationType, float]]  # tensor -> type -> nats

_VERSION = 1
_OTHERS = {  # what is wrong where a part of the label is another
    "version": "this is no file of costs that this version of the program reads",
    "source": "these costs were made with another source, or it has changed since",
    "importance": "these costs were made with another importance matrix, or with one where now is none, or without",
}
_HINT = "Make the costs (again) with --calibrate, from the same source and with the same importance matrix."


def write_costs(path: Path, costs: TypeCosts, source: TensorSource, importance: Importance | None) -> None:
    """Write a file of costs that were made with this source and this importance."""
    with disk_errors(path), disk.replacing(path) as file:
        lines = LineWriter(file)
        lines.append(_label(source, importance))
        for name, by_type in costs.items():
            lines.append({"tensor": name, "costs": {ggml_type.name: cost for ggml_type, cost in by_type.items()}})


def read_costs(path: Path, source: TensorSource, importance: Importance | None) -> TypeCosts:
    """The costs in a file. CostsError if it is none, is damaged, or was made with another source or importance."""
    try:
        first, *others = read_lines(path)
    except OSError as problem:
        raise CostsError(f"{path}: {problem.strerror or problem}", hint=_HINT) from problem
    label = first.parse(CostsError, _HINT).object()
    for key, expected in _label(source, importance).items():
        if key not in label or label[key] != expected:
            raise CostsError(f"{path}: {_OTHERS[key]}", hint=_HINT)
    return dict(_read_record(line.parse(CostsError, _HINT)) for line in others)


def _label(source: TensorSource, importance: Importance | None) -> dict[str, Any]:
    """What the costs belong to."""
    identity = importance.identity() if importance is not None else None
    return {"version": _VERSION, "source": source.identity(), "importance": identity}


def _read_record(record: Value) -> tuple[str, dict[GGMLQuantizationType, float]]:
    """A tensor's name and its costs."""
    return record["tensor"].text(), dict(_read_costs(record["costs"]))


def _read_costs(costs: Value) -> Iterator[tuple[GGMLQuantizationType, float]]:
    for name, cost in costs.members():
        if name not in GGMLQuantizationType.__members__:
            raise costs.wrong(f"costs of types, and {name!r} is none")
        yield GGMLQuantizationType[name], cost.number(0.0)
