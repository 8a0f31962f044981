"""Placement: a small example by hand, the real model's bytes, and llama.cpp's own rule of where a layer goes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from stepgguf.convert.sizes import Inventory, Sizes, take_inventory
from stepgguf.convert.sources.checkpoint import Checkpoint
from stepgguf.files.byte_sizes import GIB
from stepgguf.fit.footprint import footprint_of
from stepgguf.fit.memory import ContextParams, Footprint, memory_need
from stepgguf.fit.placement import (
    LayerBytes,
    ModelParts,
    Placement,
    place,
    unusable_room,
    weight_parts,
    with_context,
)
from tests.cli.test_cli import sparse_checkpoint

# Five layers with 2 of all else; the first one is dense, the others have 10 of experts.
PARTS = ModelParts(layers=(LayerBytes(0, 2), *[LayerBytes(10, 2)] * 4), output=3, in_ram=4, buffers=1, matrix=4)


@pytest.mark.parametrize(
    ("card", "placement"),
    [
        (54, Placement(0, (6,), (54,), 4)),  # 1 buffers + 5 x 2 + 4 x 10 + 3 output
        (53, Placement(2, (6,), (48,), 14)),  # the first layer has no experts; buffers are 1 + 4 from here on
        (38, Placement(3, (6,), (38,), 24)),
        (30, Placement(4, (6,), (28,), 34)),
        (27, Placement(5, (6,), (18,), 44)),
        (17, None),
    ],
)
def test_the_fewest_experts_are_in_ram_with_which_the_rest_fits_a_card(card: int, placement: Placement | None) -> None:
    assert place(PARTS, (card,), 50) == placement


def test_what_the_card_leaves_has_to_fit_the_ram() -> None:
    assert place(PARTS, (30,), 34) is not None
    assert place(PARTS, (30,), 33) is None
    assert place(PARTS, (54,), 3) is None, "the embedding and kept conversations are in RAM, whatever the card holds"


def test_layers_are_dealt_to_cards_in_order() -> None:
    # 2 2 2 2 | 12 3 with buffers of 5 on each; with one layer's experts more the second card overflows
    assert place(PARTS, (20, 20), 50) == Placement(4, (4, 2), (13, 20), 34)
    assert place(PARTS, (20, 19), 50) == Placement(5, (6, 0), (18, 0), 44)


def test_where_machines_follow_one_another_nothing_is_beside_them() -> None:
    # 2 2+10 2+10 | 2+10 2+10 3+4 with buffers of 1 each
    assert place(PARTS.without_ram, (27, 32), 0) == Placement(0, (3, 3), (27, 32), 0)
    assert place(PARTS.without_ram, (27, 31), 0) is None


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkpoint]:
    with Checkpoint(sparse_checkpoint(tmp_path_factory.mktemp("placement") / "Step-3.5-Flash")) as checkpoint:
        yield checkpoint


@pytest.fixture(scope="module")
def flash(real: Checkpoint) -> Inventory:
    return take_inventory(real)


@pytest.fixture(scope="module")
def model(real: Checkpoint) -> Footprint:
    return replace(footprint_of(real), weights=0)


def model_parts(model: Footprint, sizes: Sizes, context: ContextParams) -> ModelParts:
    return with_context(weight_parts(sizes, 3 if context.mtp else 0), model, context)


@pytest.mark.parametrize("mtp", [True, False])
def test_no_byte_is_lost(mtp: bool, flash: Inventory, model: Footprint) -> None:
    sizes, context = flash.sizes_as("Q4_K_S", mtp=mtp), ContextParams(32768, mtp=mtp)
    parts, needed = model_parts(model, sizes, context), memory_need(model, context)
    total = parts.in_ram + parts.output + parts.buffers + sum(y.experts + y.others for y in parts.layers)
    assert 0 <= total - (sizes.total + needed.total) <= 6  # MTP blocks are rounded up
    assert len(parts.layers) == (48 if mtp else 45)


def test_the_real_models_parts(flash: Inventory, model: Footprint, tmp_path: Path) -> None:
    (tmp_path / "q4.toml").write_text('default = "Q4_K"\n')
    parts = model_parts(model, flash.sizes_as(str(tmp_path / "q4.toml")), ContextParams(32768, cache_ram=0))
    matrix = 288 * 1280 * 4096 * 144 // 256
    assert parts.matrix == matrix
    assert [y.experts for y in parts.layers] == [0] * 3 + [3 * matrix] * 42 + [0] * 3
    assert parts.in_ram == 128896 * 4096 * 144 // 256
    assert parts.output == parts.in_ram + 4096 * 4 + 64 * 4  # its norm, and RoPE's factors, which are in F32
    room = 23 * GIB - parts.buffers - matrix - parts.output - sum(y.others for y in parts.layers)
    placed = place(parts, (23 * GIB,), 121 * GIB)
    assert placed is not None
    assert placed.n_cpu_moe == 45 - room // (3 * matrix)
    assert placed.ram == parts.in_ram + (placed.n_cpu_moe - 3) * 3 * matrix


@pytest.mark.parametrize("cards", [(23, 23), (31, 23, 15), (95, 95), (7, 47)])
def test_llama_cpp_deals_the_layers_as_its_tensor_split_says(
    cards: tuple[int, ...], flash: Inventory, model: Footprint
) -> None:
    placed = place(
        model_parts(model, flash.sizes_as("Q4_K_S"), ContextParams(8192)), [gib * GIB for gib in cards], 200 * GIB
    )
    assert placed is not None
    # llama-model.cpp: split points are summed and divided in float32, and a layer goes to the first one above it.
    points = np.cumsum(np.float32(placed.split), dtype=np.float32)
    points /= points[-1]
    layers = np.arange(49, dtype=np.float32) / np.float32(49)  # 45, 3 MTP blocks, the output
    assert np.bincount(np.searchsorted(points, layers, side="right"), minlength=len(cards)).tolist() == list(
        placed.split
    )


@pytest.mark.parametrize("name", ["IQ2_XXS", "Q2_K", "IQ4_XS", "Q4_K_S", "Q4_K_M", "Q5_K_M", "Q8_0"])
@pytest.mark.parametrize("cards", [(23,), (23, 23), (95,), (79, 79)])
def test_what_is_smaller_than_the_room_fits(
    cards: tuple[int, ...], name: str, flash: Inventory, model: Footprint
) -> None:
    sizes, context = flash.sizes_as(name), ContextParams(32768)
    needed = memory_need(model, context)
    needed = replace(needed, compute=len(cards) * needed.compute)
    room, rams = 0, range(8, 300)
    devices = [gib * GIB for gib in cards]
    for ram in rams:  # the least RAM whose room is as large as the file
        room = sum(devices) + ram * GIB - needed.total - unusable_room(needed, devices, ram * GIB, 42)
        if room >= sizes.total:
            assert place(model_parts(model, sizes, context), devices, ram * GIB) is not None
            return
    pytest.fail(f"no room in {rams}")
