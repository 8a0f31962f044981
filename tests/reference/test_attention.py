"""Attention of the reference model works on some queries at a time; torch's own on all at once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from stepgguf.model.hparams import HParams
from stepgguf.reference.model import QUERY_BLOCK, Attention, causal_mask
from tests.generate import Shape, config

T = 2 * QUERY_BLOCK + 88


@pytest.mark.parametrize("window", [None, 100, T + 1])
@pytest.mark.parametrize("document_lengths", [None, [300, 44, T - 344]])
def test_blocks_of_queries_find_what_all_queries_find(window: int | None, document_lengths: list[int] | None) -> None:
    hp = HParams.from_config(config(Shape()))
    attention, rng = Attention(hp, hp.layers[0]), torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, T, heads, 64, generator=rng) for heads in (8, 2, 2))
    document = None
    if document_lengths is not None:
        numbers = torch.repeat_interleave(torch.arange(3), torch.tensor(document_lengths))
        document = torch.stack([numbers, numbers.flip(0)])
    mask = causal_mask(T, window, document)
    whole = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask, enable_gqa=True
    ).transpose(1, 2)
    # Means of T values of size 1, of which some hundred roundings of 6e-8 are in each.
    torch.testing.assert_close(attention.attend(q, k, v, mask), whole, rtol=0, atol=5e-6)
