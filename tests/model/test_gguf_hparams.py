"""What a GGUF says of its model, from headers with just the keys that are asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFValueType

from stepgguf.errors import BadMetadata
from stepgguf.files.gguf_header import Header, Key
from stepgguf.model.gguf_hparams import GGUFHParams
from stepgguf.model.hparams import HParams

V = GGUFValueType
TYPES = {bool: V.BOOL, int: V.UINT32, float: V.FLOAT32, str: V.STRING}


def hparams(**said: Any) -> GGUFHParams:
    """Of a file that says this and nothing else; a key's dots are two underscores here."""
    keys = {"general.architecture": "step35"} | {f"step35.{k.replace('__', '.')}": v for k, v in said.items()}
    return HParams.from_gguf(Header(Path("x.gguf"), {name: key(name, v) for name, v in keys.items()}, (), 0, 32))


def key(name: str, value: Any) -> Key:
    if isinstance(value, list):
        return Key.of(name, value, V.ARRAY, V.INT32 if type(value[0]) is int else TYPES[type(value[0])])
    return Key.of(name, value, TYPES[type(value)])


def test_nothing_is_demanded_before_it_is_asked_for() -> None:
    found = hparams()
    assert (found.n_mtp, found.n_expert, found.n_expert_used, found.router_scale) == (0, 0, 0, 1.0)
    with pytest.raises(BadMetadata, match=r"^x\.gguf: the key step35\.block_count is missing$"):
        _ = found.n_layer


def test_blocks_are_the_trunks_and_mtp() -> None:
    found = hparams(block_count=48, nextn_predict_layers=3)
    assert (found.n_layer, found.n_mtp) == (45, 3)


@pytest.mark.parametrize("kv_heads", [8, [8, 4]])
def test_head_counts_may_be_one_for_all_layers(kv_heads: int | list[int]) -> None:
    found = hparams(block_count=2, attention__head_count=[64, 96], attention__head_count_kv=kv_heads)
    assert found.gqa == 8
    assert found.kv_heads == ([8, 8] if kv_heads == 8 else [8, 4])


@pytest.mark.parametrize(
    ("name", "said", "message"),
    [
        ("hidden_size", {"embedding_length": "4096"}, "step35.embedding_length is '4096', expected a count"),
        ("n_expert", {"expert_count": 288.0}, "step35.expert_count is 288.0, expected a count"),
        ("router_scale", {"expert_weights_scale": float("nan")}, "is nan, expected a number"),
        ("kv_heads", {"block_count": 3, "attention__head_count_kv": [8]}, "expected a count for each of 3 layers"),
        ("kv_heads", {"block_count": 2**31, "attention__head_count_kv": 8}, "expected at most 512"),
    ],
)
def test_a_value_that_cannot_be_is_named(name: str, said: dict[str, Any], message: str) -> None:
    with pytest.raises(BadMetadata, match=message):
        getattr(hparams(**said), name)
