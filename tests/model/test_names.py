"""Names taken apart, in both spellings."""

from __future__ import annotations

import pytest

from stepgguf.model.names import TensorName

NAMES = {
    # name: layer, stem, role
    "token_embd.weight": (None, "token_embd", "token_embd"),
    "blk.3.ffn_down_exps.weight": (3, "ffn_down_exps", "ffn_down_exps"),
    "blk.44.exp_probs_b.bias": (44, "exp_probs_b", "exp_probs_b"),
    "blk.45.nextn.eh_proj.weight": (45, "nextn.eh_proj", "eh_proj"),
    "model.layers.3.moe.gate.weight": (3, "moe.gate", "gate"),
    "lm_head.weight": (None, "lm_head", "lm_head"),
    "blk.x.attn_q.weight": (None, "blk.x.attn_q", "attn_q"),
    "blk.7": (None, "blk", "blk"),
    "name": (None, "name", "name"),
    "": (None, "", ""),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_says_layer_stem_and_role(name: str) -> None:
    found = TensorName(name)
    assert (found.layer, found.stem, found.role) == NAMES[name]
    assert found == name


def test_experts_are_routed_experts() -> None:
    assert TensorName("blk.3.ffn_up_exps.weight").is_expert
    assert not TensorName("blk.3.ffn_up_shexp.weight").is_expert


def test_mtp_is_what_lies_behind_the_trunk() -> None:
    assert TensorName("blk.45.attn_q.weight").is_mtp(45)
    assert TensorName("model.layers.45.self_attn.q_proj.weight").is_mtp(45)
    assert not TensorName("blk.44.attn_q.weight").is_mtp(45)
    assert not TensorName("output.weight").is_mtp(0)


def test_files_begin_with_what_is_in_no_layer_and_go_layer_by_layer() -> None:
    names = ["output.weight", "token_embd.weight", "blk.2.attn_q.weight", "blk.2.ffn_up.weight", "blk.10.attn_k.weight"]
    assert sorted(map(TensorName, reversed(names)), key=lambda name: name.file_order) == names
