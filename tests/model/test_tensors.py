"""The table against every tensor of the published repositories."""

from __future__ import annotations

import json

import gguf
import pytest

from stepgguf.model.hparams import HParams
from stepgguf.model.rope import ROPE_FREQS
from stepgguf.model.spelling import VISION_PREFIXES
from stepgguf.model.tensors import TENSORS, tensor_specs
from tests.conftest import DATA, real_config


def published() -> dict[str, tuple[tuple[int, ...], str, str]]:
    """Name -> shape, dtype in the BF16 repository, dtype in the FP8 one ("-": not there)."""
    rows = {}
    for line in (DATA / "step-3.7-flash-tensors.tsv").read_text().splitlines()[1:]:
        name, shape, _, bf16, fp8 = line.split("\t")
        rows[name] = (tuple(json.loads(shape)), bf16, fp8)
    return rows


@pytest.mark.parametrize("version", ["3.5", "3.7"])
def test_the_table_covers_the_published_text_tensors_exactly(version: str) -> None:
    text = {
        n: shape for n, (shape, bf16, _) in published().items() if bf16 != "-" and not n.startswith(VISION_PREFIXES)
    }
    specs = tensor_specs(HParams.from_config(real_config(version)))
    assert len(specs) == 804
    assert {spec.source: spec.shape for spec in specs} == text


def test_every_fp8_tensor_has_scales_of_128_by_128_blocks() -> None:
    rows = published()
    quantized = [name for name, (_, _, fp8) in rows.items() if fp8 == "F8_E4M3"]
    assert len(quantized) == 126
    for name in quantized:
        (n, height, width), _, _ = rows[name]
        assert rows[name + "_scale_inv"] == ((n, height // 128, width // 128), "-", "F32")


def test_gguf_names_are_those_that_gguf_py_gives_the_architecture() -> None:
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.STEP35, 48)
    for spec in tensor_specs(HParams.from_config(real_config())):
        if spec.is_mtp and ("shared_head" in spec.source or "hnorm" in spec.source or "en" in spec.role[:2]):
            continue  # gguf-py 0.19's STEP35 list has no nextn tensors; llama.cpp's loader has
        if "eh_proj" in spec.source:
            continue
        source = spec.source + ".bias" if spec.source.endswith("router_bias") else spec.source
        assert names.get_name(source, try_suffixes=(".weight", ".bias")) == spec.name


def test_floors_hold_for_norms_router_and_everything_one_dimensional() -> None:
    for spec in tensor_specs(HParams.from_config(real_config())):
        floor = len(spec.shape) == 1 or spec.role == "ffn_gate_inp"
        assert spec.is_quantizable == (not floor)
        assert spec.plus_one == ("norm" in spec.role)


def test_the_table_has_no_duplicates() -> None:
    assert len({(row.where, row.source) for row in TENSORS}) == len(TENSORS)
    assert len({row.name for row in TENSORS} | {ROPE_FREQS}) == len(TENSORS) + 1
