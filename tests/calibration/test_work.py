"""What passes are said to compute, against torch's own count of what they compute."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from stepgguf.calibration import work
from stepgguf.calibration.token_weights import TokenWeights
from stepgguf.calibration.work import calibration_work, imatrix_work
from stepgguf.convert.sources.checkpoint import Checkpoint
from stepgguf.convert.sources.full_hparams import full_hparams
from stepgguf.reference.backward import BackwardStream
from stepgguf.reference.stream import LayerStream
from stepgguf.reference.token_rows import TokenRows
from stepgguf.reference.weights import WeightReader
from tests.generate import Shape, write_checkpoint


def attention_flop(queries: Any, keys: Any, values: Any, *args: Any, out_val: Any, **kwargs: Any) -> int:
    others = (_of_all_heads(x.shape, queries) for x in (keys, values))
    return int(sdpa_flop_count(queries.shape, *others))  # type: ignore[no-untyped-call]


def attention_back_flop(at_out: Any, queries: Any, keys: Any, values: Any, *args: Any, out_val: Any, **kw: Any) -> int:
    others = (_of_all_heads(x.shape, queries) for x in (keys, values))
    return int(sdpa_backward_flop_count(at_out.shape, queries.shape, *others))  # type: ignore[no-untyped-call]


def _of_all_heads(shape: torch.Size, queries: torch.Tensor) -> tuple[int, ...]:
    """Torch's formulas know no groups of heads that share keys."""
    return shape[0], queries.shape[1], *shape[2:]


# Torch has a formula for its attention on GPUs, which is this one.
FORMULAS = flop_registry | {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flop,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_back_flop,
}


class FlopCount(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts with torch's own formulas; its FlopCounterMode does not go with torch.autograd.grad."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result, formula = func(*args, **(kwargs or {})), FORMULAS.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


@pytest.fixture
def stream(tmp_path: Path) -> Iterator[LayerStream]:
    """Of two rows that are longer than a block of queries, through full and sliding attention."""
    with Checkpoint(write_checkpoint(tmp_path / "checkpoint", Shape(window=64, n_mtp=1))) as source:
        rows = TokenRows.of(np.random.default_rng(0).integers(0, 768, (2, 640), np.int32))
        reader = WeightReader(source, full_hparams(source), torch.device("cpu"))
        yield LayerStream(reader, rows, tmp_path / "states", keep_inputs=True)


@pytest.fixture
def products_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention as multiplications, and not as what they take: forward two products, backward five."""
    monkeypatch.setattr(work, "ATTENTION_SLOWNESS", 1.0)
    monkeypatch.setattr(work, "ATTENTION_BACK", 2.5)


@pytest.mark.usefixtures("products_only")
def test_passes_compute_what_was_counted(stream: LayerStream) -> None:
    counted = calibration_work(stream.hp, stream.rows)
    with FlopCount() as exact:
        stream.run_trunk()
    with FlopCount() as gradients:
        BackwardStream(stream, observers=[TokenWeights(stream.rows.text.size, stream.hp.vocab_size)]).run()
    assert counted["exact model"]["streams"].flop == exact.total
    # Nothing is predicted of a row's last token.
    assert counted["gradients"]["streams"].flop == pytest.approx(gradients.total, rel=1 / 640)


@pytest.mark.usefixtures("products_only")
def test_a_stream_with_mtp_computes_what_was_counted(stream: LayerStream) -> None:
    with FlopCount() as whole:
        stream.run_all()
    assert imatrix_work(stream.hp, stream.rows).flop == whole.total
