"""The layer stream and the resident model on a layer of the published widths, with fewer experts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from stepgguf.convert.sources.checkpoint import Checkpoint
from stepgguf.reference.load import load_reference
from stepgguf.reference.stream import LayerStream
from stepgguf.reference.token_rows import TokenRows
from stepgguf.reference.weights import WeightReader
from tests.generate import Shape, write_checkpoint

# A small dense layer with full attention, then an MoE layer with a sliding window. 160 M weights.
SHAPE = Shape(
    n_layer=2, n_dense=1, n_expert=2, n_used=1, hidden=4096, dense=512, expert=1280, head_dim=128, heads=(8, 96),
    kv_heads=8, window=512,
)  # fmt: skip


@pytest.mark.slow
def test_a_layer_of_the_published_widths_is_the_same_in_both(tmp_path: Path) -> None:
    with Checkpoint(write_checkpoint(tmp_path / "checkpoint", SHAPE)) as source:
        rows = TokenRows.of(np.random.default_rng(0).integers(0, SHAPE.vocab, (1, 520), np.int32))
        stream = LayerStream(WeightReader(source, source.hparams, torch.device("cpu")), rows, tmp_path / "states")
        stream.run_trunk()
        resident = load_reference(source)
        with torch.no_grad():
            exact = resident.hidden(torch.from_numpy(rows.tokens).long())
    states = torch.from_numpy(np.array(stream.folder.states(SHAPE.n_layer)))
    # Float32 sums of up to 12,288 products; 7e-6 was measured on 4,096 tokens.
    torch.testing.assert_close(states, exact, rtol=0, atol=5e-5)
