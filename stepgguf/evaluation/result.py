"""What an evaluation found, as plain data: for --json, for a file, and for `stepgguf report --eval`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stepgguf.convert.sources.splits import read_headers
from stepgguf.evaluation.columns import Column
from stepgguf.evaluation.divergence import Divergence
from stepgguf.model.names import TensorName


def result_of(
    path: Path, against: str, top_k: int, columns: Sequence[Column], found: Iterable[Divergence]
) -> dict[str, Any]:
    """Return the result as data. top_k: what the reference kept of a distribution; 0 is all."""
    n_bytes, n_values = _trunk_size(path)
    return {
        "file": path.name,
        "bytes": n_bytes,
        "bpw": round(8 * n_bytes / n_values, 4),
        "against": against,
        "top_k": top_k,
        "columns": [_column_result(column, d) for column, d in zip(columns, found, strict=True)],
    }


def _trunk_size(path: Path) -> tuple[int, int]:
    """Bytes and values of a file's tensors without its MTP blocks, which take no part in these logits."""
    tensors = [tensor for header in read_headers(path) for tensor in header.tensors]
    mtp = {TensorName(tensor.name).layer for tensor in tensors if ".nextn." in tensor.name}
    trunk = [tensor for tensor in tensors if TensorName(tensor.name).layer not in mtp]
    return sum(tensor.n_bytes for tensor in trunk), sum(tensor.n_values for tensor in trunk)


def _column_result(column: Column, found: Divergence) -> dict[str, Any]:
    figures = asdict(found)
    figures["kld_quantiles"] = {str(fraction): value for fraction, value in found.kld_quantiles.items()}
    return {
        "name": column.name,
        "context": column.n_ctx,
        "rows": len(column.rows),
        "tokens": _digest(column),
        "predictions": figures.pop("n"),
        **figures,
    }


def _digest(column: Column) -> str:
    """A digest of the tokens: figures of different tokens are not to be compared."""
    digest = hashlib.sha256()
    for row in column.rows:
        digest.update(row.astype("<i4").tobytes() + b"\n")
    return digest.hexdigest()[:16]
