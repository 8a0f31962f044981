"""stepgguf inspect: what is in a GGUF or a checkpoint."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from stepgguf.cli import arguments


def inspect(
    path: Annotated[
        Path, typer.Argument(metavar="FILE|DIR", help="A GGUF file (of a split one, any) or a checkpoint directory.")
    ],
    json: arguments.Json = False,
) -> None:
    """Show metadata, types folded by layer, sizes and bits per weight.

    Examples:

    - `stepgguf inspect step-q4_k_s.gguf`
    - `stepgguf inspect Step-3.5-Flash-FP8/`
    - `stepgguf inspect step-q4_k_s.gguf --json`
    """
    from stepgguf.cli import output
    from stepgguf.convert.fold import fold

    metadata, tensors = _checkpoint(path) if path.is_dir() else _gguf(path)
    lines = fold(tensors)
    n_bytes, n_values = sum(line.n_bytes for line in lines), sum(line.n_values for line in lines)
    summary = {
        "tensors": len(tensors),
        "values": n_values,
        "bytes": n_bytes,
        "bpw": round(n_bytes * 8 / max(1, n_values), 4),
    }
    if json:
        folded = [
            {"layers": line.layers, "role": line.role, "count": line.count, "type": line.type, "bytes": line.n_bytes}
            for line in lines
        ]
        output.data({"path": str(path), "metadata": metadata, "folded": folded, **summary})
        return
    width = max(len(key) for key in metadata)
    for key, value in metadata.items():
        sys.stdout.write(f"{key:<{width}}  {_short(value)}\n")
    sys.stdout.write(
        f"\n{output.table(lines)}\n{len(tensors)} tensors, {n_values / 1e9:.3f} B values, {n_bytes / 2**30:.2f} GiB "
        f"({n_bytes / 1e9:.2f} GB), {summary['bpw']:.3f} bpw\n"
    )


Tensors = list[tuple[str, str, int, int, str]]


def _gguf(path: Path) -> tuple[dict[str, Any], Tensors]:
    from stepgguf.convert import header as gguf_header
    from stepgguf.convert.splits import split_files

    headers = [gguf_header.read(file) for file in split_files(path)]
    metadata = {name: key.value for name, key in headers[0].keys.items()}
    tensors = [(t.name, t.ggml_type.name, t.n_bytes, t.n_values, "") for h in headers for t in h.tensors]
    return metadata, tensors


def _checkpoint(path: Path) -> tuple[dict[str, Any], Tensors]:
    from stepgguf.cli import output
    from stepgguf.convert.checkpoint import Checkpoint
    from stepgguf.convert.shards import DTYPE_BYTES

    with Checkpoint(path) as checkpoint:
        output.warn(checkpoint.warnings)
        hp = checkpoint.hparams
        metadata = {field: getattr(hp, field) for field in hp.__slots__ if field != "layers"}
        metadata["rope_scaling"] = str(hp.rope_scaling)
        metadata["layers"] = [
            f"{'mtp ' if y.is_mtp else ''}{'moe' if y.is_moe else 'dense'} {'sliding' if y.is_sliding else 'full'}"
            for y in hp.layers
        ]
        tensors = []
        for spec in checkpoint.specs:
            dtype, n = checkpoint.tensors[spec.source].dtype, math.prod(spec.shape)
            tensors.append((spec.name, dtype, n * DTYPE_BYTES[dtype], n, ""))
    return metadata, tensors


def _short(value: Any) -> str:
    """One line: long lists and strings are cut."""
    if isinstance(value, list) and len(value) > 12:
        return f"{len(value)} items: {', '.join(map(repr, value[:6]))}, ..."
    text = str(value).replace("\n", "\\n")
    return text if len(text) <= 110 else f"{text[:100]}... ({len(text)} characters)"
