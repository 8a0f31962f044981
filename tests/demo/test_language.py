"""The language model that quantization is proved on: its quick training computes the same, its texts are apart."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from benchmarks.language_rows import BOS_ID, rows
from benchmarks.language_text import HANDBOOK_LANGUAGES, Document, at_least_one, debian_handbook
from benchmarks.language_training import language_config, quicken
from stepgguf.errors import StepggufError
from stepgguf.model.hparams import HParams
from stepgguf.reference.model import Step35


@pytest.mark.slow
def test_the_quick_model_computes_what_the_reference_does() -> None:
    torch.manual_seed(0)
    small = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64, "share_expert_dim": 64}
    hp = HParams.from_config({**language_config([1]), **small, "vocab_size": 64})
    reference, quick = Step35(hp), Step35(hp)
    quicken(quick)
    quick.load_state_dict(reference.state_dict())
    tokens = torch.randint(0, 64, (2, 4 * hp.sliding_window))
    with torch.no_grad():
        torch.testing.assert_close(quick(tokens), reference(tokens))


def test_every_row_begins_with_bos_and_no_token_is_in_two() -> None:
    found = rows(np.arange(1, 1000, dtype=np.int32), 10)
    assert found.shape == (111, 10)
    assert found.dtype == np.int32
    assert (found[:, 0] == BOS_ID).all()
    assert sorted(found[:, 1:].flatten()) == list(range(1, 1000))


def test_a_page_of_the_handbook_has_one_name_and_so_one_split_in_all_languages() -> None:
    try:
        pages = Counter(page.name for page in at_least_one(debian_handbook))
    except StepggufError as error:
        pytest.skip(f"{error} {error.hint}")
    assert pages["handbook/sect.apt-cache.html"] == len(HANDBOOK_LANGUAGES)


def test_the_split_hangs_on_the_name_alone() -> None:
    splits = [Document(f"page/{i}", str).split for i in range(10_000)]
    assert [splits.count(split) for split in ("held-out", "calibration")] == pytest.approx([500, 500], rel=0.15)
