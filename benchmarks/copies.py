"""Copies of a GGUF that compute the same function with their channels in another order: other draws of rounding errors.

Blocks of 256 of a permuted matrix hold other weights together. So what quantizing costs one copy and not another is
luck, and the mean over copies tells a gain from it. Permuted are the residual stream, the value heads with the columns
that read them, and the hidden units of each expert and of dense layers; the importance matrix alike.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepgguf.files import gguf_header as header
from stepgguf.model.hparams import ARCHITECTURE
from stepgguf.model.names import TensorName
from stepgguf.quants.imatrix import Imatrix

Floats = NDArray[np.float32]

READS_STREAM = (
    "token_embd", "output", "attn_norm", "ffn_norm", "output_norm", "attn_q", "attn_k", "attn_v", "attn_gate",
)  # fmt: skip


def reorder(path: Path, matrix: Imatrix, rng: np.random.Generator) -> Imatrix:
    """Permute the channels of an F32 GGUF without MTP blocks in place; returns the importance matrix to match."""
    copy = _Copy(path, matrix)
    stream = rng.permutation(copy.values["output_norm.weight"].size)
    for name in copy.values:
        role = TensorName(name).role
        if role in READS_STREAM or role.startswith(("ffn_gate", "ffn_up")):
            copy.columns(name, stream)
        if role == "attn_output" or role.startswith("ffn_down"):
            copy.rows(name, stream)
        if role == "attn_output":
            copy.value_heads(name, rng)
        if role.startswith("ffn_down"):
            copy.hidden_units(name, rng)
    return replace(
        matrix, entries={name: replace(entry, sums=copy.sums[name]) for name, entry in matrix.entries.items()}
    )


class _Copy:
    """values: name -> a view of the file. sums: those of the importance matrix."""

    def __init__(self, path: Path, matrix: Imatrix) -> None:
        found, raw = header.read(path), np.memmap(path, np.uint8, "r+")
        self.heads, self.kv_heads = (
            found.get(f"{ARCHITECTURE}.attention.{key}") for key in ("head_count", "head_count_kv")
        )
        self.head_size = int(found.get(f"{ARCHITECTURE}.attention.value_length"))
        self.values: dict[str, Floats] = {
            t.name: raw[found.data_start + t.offset :][: 4 * t.n_values].view(np.float32).reshape(t.shape)
            for t in found.tensors
        }
        self.sums = {name: np.array(entry.sums) for name, entry in matrix.entries.items()}

    def columns(self, name: str, order: NDArray[np.int64], expert: Any = ...) -> None:
        for values in (self.values, self.sums):
            if name in values:
                part = values[name][expert]
                part[:] = part[..., order].copy()

    def rows(self, name: str, order: NDArray[np.int64], expert: Any = ...) -> None:
        part = self.values[name][expert]
        part[:] = part[..., order, :].copy()

    def value_heads(self, name: str, rng: np.random.Generator) -> None:
        layer, size = TensorName(name).layer, self.head_size
        assert layer is not None
        n, n_kv = self.heads[layer], self.kv_heads[layer]
        orders = [head * size + rng.permutation(size) for head in range(n_kv)]
        self.rows(name.replace("output", "v"), np.concatenate(orders))
        shifts = [(q - q * n_kv // n) * size for q in range(n)]
        self.columns(name, np.concatenate([orders[q * n_kv // n] + shifts[q] for q in range(n)]))

    def hidden_units(self, name: str, rng: np.random.Generator) -> None:
        down = self.values[name]
        for expert in range(len(down)) if down.ndim == 3 else [...]:
            order = rng.permutation(down.shape[-1])
            self.columns(name, order, expert)
            for role in ("gate", "up"):
                self.rows(name.replace("down", role), order, expert)
