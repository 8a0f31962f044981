"""What an importance matrix lacks for a model: tensors without data, experts that calibration hardly saw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stepgguf.errors import ImatrixError
from stepgguf.model.tensors import TensorSpec
from stepgguf.quants.imatrix import THIN_TOKENS, Imatrix, ImatrixEntry

# What llama.cpp's tool does not record: the embedding is looked up, not multiplied.
_NEVER_RECORDED = frozenset({"token_embd"})


@dataclass(frozen=True, slots=True)
class LayerCoverage:
    """What calibration saw of one layer's routed experts. `thin`, `least` and `median` (tokens) are None if unknown."""

    layer: int
    n_expert: int
    unseen: int
    thin: int | None
    least: int | None
    median: float | None


@dataclass(frozen=True, slots=True)
class Coverage:
    """What an importance matrix lacks for a model.

    missing: names of tensors without data. missing_mtp: the same of MTP blocks, which few tools run.
    """

    layers: tuple[LayerCoverage, ...]
    missing: tuple[str, ...]
    missing_mtp: tuple[str, ...]

    @property
    def warnings(self) -> tuple[str, ...]:
        """One sentence for each kind of gap."""
        unseen = [row for row in self.layers if row.unseen]
        thin = [row for row in self.layers if row.thin]
        unknown = [row for row in self.layers if row.thin is None]
        sentences = []
        if self.missing:
            sentences.append(f"no data for {_list_some(self.missing)}: quantized unweighted")
        if self.missing_mtp:
            sentences.append(f"no data for {len(self.missing_mtp)} MTP tensors; `stepgguf imatrix` runs MTP blocks too")
        if unseen:
            worst = max(unseen, key=lambda row: row.unseen)
            total = sum(row.unseen for row in unseen)
            sentences.append(
                f"{total} experts in {len(unseen)} layers saw no token (most in layer {worst.layer}: "
                f"{worst.unseen} of {worst.n_expert})"
            )
        if thin:
            total = sum(row.thin or 0 for row in thin)
            sentences.append(f"{total} experts in {len(thin)} layers saw fewer than {THIN_TOKENS} tokens")
        if unknown:
            sentences.append(
                f"tokens per expert are unknown in {len(unknown)} layers: the file keeps no counts of them"
            )
        return tuple(sentences)


def _list_some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def check_coverage(imatrix: Imatrix, tensors: Sequence[TensorSpec]) -> Coverage:
    """Compare the matrix with the tensors that shall be quantized. ImatrixError if it is of another model."""
    entries = {tensor.name: imatrix.entry_of(tensor.name, tensor.shape) for tensor in tensors}
    missing = [t for t in tensors if entries[t.name] is None and t.role not in _NEVER_RECORDED]
    if len(missing) == len(tensors) and not all(t.is_mtp for t in tensors):
        found = _list_some(list(imatrix.entries))
        raise ImatrixError(
            f"{imatrix.path}: it has {found}, none of which the model has",
            hint="This importance matrix was made from another model.",
        )
    experts: dict[int, list[ImatrixEntry]] = {}
    for tensor in tensors:
        entry = entries[tensor.name]
        if entry is not None and len(entry.counts) > 1 and tensor.layer is not None:
            experts.setdefault(tensor.layer, []).append(entry)
    return Coverage(
        layers=tuple(_cover_layer(layer, found) for layer, found in sorted(experts.items())),
        missing=tuple(t.name for t in missing if not t.is_mtp),
        missing_mtp=tuple(t.name for t in missing if t.is_mtp),
    )


def _cover_layer(layer: int, entries: Sequence[ImatrixEntry]) -> LayerCoverage:
    tokens = np.min([entry.counts for entry in entries], axis=0)  # gate, up and down see the same tokens
    n, unseen = len(tokens), int((tokens == 0).sum())
    if not all(entry.counted for entry in entries):
        return LayerCoverage(layer, n, unseen, None, None, None)
    thin = int((tokens < THIN_TOKENS).sum()) - unseen
    return LayerCoverage(layer, n, unseen, thin, int(tokens.min()), float(np.median(tokens)))
