"""What a matrix lacks for a model, on matrices made for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from stepgguf.errors import ImatrixError
from stepgguf.model.tensors import TensorSpec
from stepgguf.quants.coverage import Coverage, check_coverage
from stepgguf.quants.imatrix import ImatrixEntry, read_imatrix
from tests.quants.test_imatrix import B, dat, made, wanted

DENSE = wanted("blk.10.attn_q.weight", (5, 32))
EXPERTS = wanted("blk.3.ffn_down_exps.weight", (6, 5, 32))


def test_coverage_counts_the_experts_of_each_layer() -> None:
    found = check_coverage(made(), [DENSE, EXPERTS])
    assert (found.missing, found.missing_mtp) == ((), ())
    (row,) = found.layers
    assert (row.layer, row.n_expert, row.unseen, row.thin, row.least, row.median) == (3, 6, 2, 2, 0, 40.0)
    assert found.warnings == (
        "2 experts in 1 layers saw no token (most in layer 3: 2 of 6)",
        "2 experts in 1 layers saw fewer than 256 tokens",
    )


def test_tensors_without_data_are_told_apart() -> None:
    absent = [
        wanted("token_embd.weight", (5, 32)),
        wanted("output.weight", (5, 32)),
        wanted("blk.45.attn_q.weight", (5, 32), is_mtp=True),
    ]
    found = check_coverage(made(), [DENSE, *absent])
    assert found == Coverage((), missing=("output.weight",), missing_mtp=("blk.45.attn_q.weight",))
    assert found.warnings == (
        "no data for output.weight: quantized unweighted",
        "no data for 1 MTP tensors; `stepgguf imatrix` runs MTP blocks too",
    )


def test_an_entry_that_saw_nothing_is_no_data() -> None:
    nothing = ImatrixEntry(np.zeros((6, 32), np.float32), np.zeros(6, np.float32))
    imatrix = replace(made(), entries={**made().entries, EXPERTS.name: nothing})
    assert imatrix.entry_of(EXPERTS.name, EXPERTS.shape) is None
    assert check_coverage(imatrix, [DENSE, EXPERTS]).missing == (EXPERTS.name,)


def test_a_dat_says_that_it_has_no_tokens_per_expert(tmp_path: Path) -> None:
    found = check_coverage(read_imatrix(dat(tmp_path / "old.dat")), [B])
    (row,) = found.layers
    assert (row.unseen, row.thin, row.least, row.median) == (1, None, None, None)
    assert found.warnings[-1] == "tokens per expert are unknown in 1 layers: the file keeps no counts of them"


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (replace(EXPERTS, shape=(3, 5, 64)), "blk.3.ffn_down_exps.weight has 6 x 32 values, expected 3 x 64"),
        (replace(DENSE, shape=(5, 64)), "blk.10.attn_q.weight has 1 x 32 values, expected 1 x 64"),
        (wanted("blk.0.attn_q.weight", DENSE.shape), "made: it has .* and .* more|none of which the model has"),
    ],
)
def test_a_matrix_of_another_model_is_refused(tensor: TensorSpec, message: str) -> None:
    with pytest.raises(ImatrixError, match=message) as caught:
        check_coverage(made(), [tensor])
    assert "another model" in (caught.value.hint or "")


def test_mtp_alone_is_not_taken_for_another_model() -> None:
    mtp = wanted("blk.45.attn_q.weight", (5, 32), is_mtp=True)
    assert check_coverage(made(), [mtp]).missing_mtp == (mtp.name,)
