"""What an evaluation found, as plain data: for --json, for a file, and for `stepgguf report --eval`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stepgguf.convert.metadata import CALIBRATION, PREDICTED_KLD
from stepgguf.convert.sources.splits import read_headers
from stepgguf.evaluation.columns import Column
from stepgguf.evaluation.divergence import divergence, error_by_rows
from stepgguf.evaluation.scores import Scores
from stepgguf.files.gguf_header import Header
from stepgguf.model.names import TensorName
from stepgguf.quants.mixtures import BASE_TYPES


def result_of(
    path: Path, against: str, engine: str, top_k: int, columns: Sequence[Column], scores: Iterable[Scores]
) -> dict[str, Any]:
    """Return the result as data. engine: what ran the file. top_k: what the reference kept of a distribution; 0 is all.

    scores: of each column, asked for one after the other.
    """
    headers = read_headers(path)
    n_bytes, n_values = _trunk_size(headers)
    return {
        "file": path.name,
        "is_stock": _is_stock(headers[0]),
        "engine": engine,
        "bytes": n_bytes,
        "bpw": round(8 * n_bytes / n_values, 4),
        "predicted_kld": headers[0].get(PREDICTED_KLD),
        "against": against,
        "top_k": top_k,
        "columns": [_column_result(column, found) for column, found in zip(columns, scores, strict=True)],
    }


def _is_stock(header: Header) -> bool:
    """Whether a file has one of llama.cpp's own mixtures, in the codes that llama-quantize chooses too."""
    return header.get("stepgguf.type", "F32") in BASE_TYPES and CALIBRATION not in header.keys


def _trunk_size(headers: Sequence[Header]) -> tuple[int, int]:
    """Bytes and values of a file's tensors without its MTP blocks, which take no part in these logits."""
    tensors = [tensor for header in headers for tensor in header.tensors]
    mtp = {TensorName(tensor.name).layer for tensor in tensors if ".nextn." in tensor.name}
    trunk = [tensor for tensor in tensors if TensorName(tensor.name).layer not in mtp]
    return sum(tensor.n_bytes for tensor in trunk), sum(tensor.n_values for tensor in trunk)


def _column_result(column: Column, scores: Scores) -> dict[str, Any]:
    found = divergence(scores)
    figures = asdict(found)
    figures["kld_quantiles"] = {str(fraction): value for fraction, value in found.kld_quantiles.items()}
    if not column.second_half:  # whole texts of their own
        figures["errors_by_row"] = {
            "ln_ratio": error_by_rows(scores.nll - scores.nll_base, column.row_lengths),
            "kld": error_by_rows(scores.kld, column.row_lengths),
        }
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
