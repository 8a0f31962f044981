"""Tensor lists for people: tensors of the same stem and type become one line over their layers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from stepgguf.model.names import TensorName


@dataclass(frozen=True, slots=True)
class FoldedLine:
    """Tensors of one stem (TensorName's), type and reason. layers: "3-44" or "3-4,7,10"; empty outside the layers."""

    layers: str
    stem: str
    count: int
    type: str
    n_bytes: int
    n_values: int
    reason: str

    @property
    def label(self) -> str:
        """What the line is about: "blk.3-44 ffn_up_exps", or the stem alone outside the layers."""
        return f"blk.{self.layers} {self.stem}" if self.layers else self.stem


def fold_tensors(tensors: Iterable[tuple[str, str, int, int, str]]) -> list[FoldedLine]:
    """Lines from (name, type, bytes, values, reason), in order of first appearance."""
    groups: dict[tuple[str, str, str, bool], list[tuple[TensorName, int, int]]] = {}
    for name, type_name, n_bytes, n_values, reason in tensors:
        parsed = TensorName(name)
        groups.setdefault((parsed.stem, type_name, reason, parsed.layer is not None), []).append(
            (parsed, n_bytes, n_values)
        )
    return [
        FoldedLine(
            layers=format_ranges([layer for name, _, _ in members if (layer := name.layer) is not None]),
            stem=stem,
            count=len(members),
            type=type_name,
            n_bytes=sum(n for _, n, _ in members),
            n_values=sum(n for _, _, n in members),
            reason=reason,
        )
        for (stem, type_name, reason, _), members in groups.items()
    ]


def format_ranges(numbers: Sequence[int]) -> str:
    """[3, 4, 5, 7] -> "3-5,7"."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in parts)
