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
    PlacedModel,
    place,
    place_somehow,
    unusable_room,
    weight_parts,
    with_context,
)
from stepgguf.runtime.placement import ALL_LAYERS, Placement
from tests.cli.test_cli import sparse_checkpoint

# Five layers with 2 of all else; the first one is dense, the others have 10 of experts.
PARTS = ModelParts(layers=(LayerBytes(0, 2), *[LayerBytes(10, 2)] * 4), output=3, in_ram=4, buffers=1, matrix=4)


def placed(n_cpu_moe: int, counts: tuple[int, ...], cards: tuple[int, ...], ram: int) -> PlacedModel:
    """On one card there is nothing to split."""
    split = tuple(map(float, counts)) if len(cards) > 1 else None
    return PlacedModel(Placement(n_cpu_moe=n_cpu_moe, tensor_split=split), counts, cards, ram)


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        (54, placed(0, (6,), (54,), 4)),  # 1 buffers + 5 x 2 + 4 x 10 + 3 output
        (53, placed(2, (6,), (48,), 14)),  # the first layer has no experts; buffers are 1 + 4 from here on
        (38, placed(3, (6,), (38,), 24)),
        (30, placed(4, (6,), (28,), 34)),
        (27, placed(5, (6,), (18,), 44)),
        (17, None),
    ],
)
def test_the_fewest_experts_are_in_ram_with_which_the_rest_fits_a_card(card: int, expected: PlacedModel | None) -> None:
    assert place(PARTS, (card,), 50) == expected


def test_what_the_card_leaves_has_to_fit_the_ram() -> None:
    assert place(PARTS, (30,), 34) is not None
    assert place(PARTS, (30,), 33) is None
    assert place(PARTS, (54,), 3) is None, "the embedding and kept conversations are in RAM, whatever the card holds"


def test_layers_are_dealt_to_cards_in_order() -> None:
    # 2 2 2 2 | 12 3 with buffers of 5 on each; with one layer's experts more the second card overflows
    assert place(PARTS, (20, 20), 50) == placed(4, (4, 2), (13, 20), 34)
    assert place(PARTS, (20, 19), 50) == placed(5, (6, 0), (18, 0), 44)


def test_what_is_set_is_kept_and_the_rest_is_chosen_around_it() -> None:
    wish = Placement(n_cpu_moe=3)
    assert place(PARTS, (54,), 50, wish) == placed(3, (6,), (38,), 24)
    assert place(PARTS, (37,), 50, wish) is None
    assert place_somehow(PARTS, (37,), 50, wish) is not None, "the first layer can go into RAM"
    # The first two layers in RAM, their experts too, and the matrix on its way: 5 + 3 x 12 + 3
    found = place(PARTS, (44,), 50, Placement(gpu_layers=4))
    assert found is not None
    assert (found.n_cpu_moe, found.counts, found.cards, found.ram) == (0, (4,), (44,), 4 + 2 + 12)
    for gpu_layers, counts in ((6, (6,)), (0, (0,)), (ALL_LAYERS, (6,))):
        found = place(PARTS, (54,), 60, Placement(gpu_layers=gpu_layers))
        assert found is not None
        assert found.counts == counts


def test_shares_are_dealt_as_llama_cpp_deals_them() -> None:
    # 2 12 12 | 12 12 3 with buffers of 1 each
    found = place(PARTS, (27, 28), 50, Placement(tensor_split=(1.0, 1.0)))
    assert found is not None
    assert (found.n_cpu_moe, found.counts, found.cards) == (0, (3, 3), (27, 28))
    assert found.placement.tensor_split == (1.0, 1.0)
    found = place(PARTS, (26, 100), 50, Placement(tensor_split=(1.0, 1.0)))
    assert found is not None
    assert (found.n_cpu_moe, found.counts) == (2, (3, 3)), "experts make room where the share is fixed"
    assert place(PARTS, (5, 100), 50, Placement(tensor_split=(1.0, 1.0))) is None


def test_without_a_split_all_is_on_one_card() -> None:
    found = place(PARTS, (54, 54), 50, Placement(split_mode="none", main_gpu=1))
    assert found is not None
    assert found.counts == (0, 6)
    assert place(PARTS, (54, 54), 50, Placement(split_mode="none", main_gpu=2)) is None


def test_layers_are_left_in_ram_only_where_their_experts_alone_do_not_help() -> None:
    found = place_somehow(PARTS, (17,), 60, Placement())
    assert found is not None
    assert found.placement.gpu_layers == 5, "18 would be all layers without experts"
    assert place_somehow(PARTS, (17,), 60, Placement(gpu_layers=6)) is None


def test_tensors_that_are_sent_to_the_cpu_are_counted_in_ram(flash: Inventory) -> None:
    sizes = flash.sizes_as("Q4_K_S", mtp=False)
    plain = weight_parts(sizes, 0)
    moved = weight_parts(sizes, 0, ((r"blk\.44\..*_exps", "CPU"), ("attn", "CUDA0"), ("ffn_down", "CPU")))
    assert moved.in_ram > plain.in_ram + plain.layers[44].experts
    assert (moved.layers[44].experts, moved.layers[43].others) == (0, plain.layers[43].others - _shared_down(sizes, 43))
    total = sum(y.experts + y.others for y in plain.layers) + plain.in_ram
    assert sum(y.experts + y.others for y in moved.layers) + moved.in_ram == total


def _shared_down(sizes: Sizes, layer: int) -> int:
    return sum(n_bytes for name, n_bytes in sizes.trunk if name.layer == layer and name.role == "ffn_down_shexp")


def test_where_machines_follow_one_another_nothing_is_beside_them() -> None:
    # 2 2+10 2+10 | 2+10 2+10 3+4 with buffers of 1 each
    assert place(PARTS.without_ram, (27, 32), 0) == placed(0, (3, 3), (27, 32), 0)
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
    found = place(parts, (23 * GIB,), 121 * GIB)
    assert found is not None
    assert found.n_cpu_moe == 45 - room // (3 * matrix)
    assert found.ram == parts.in_ram + (found.n_cpu_moe - 3) * 3 * matrix


@pytest.mark.parametrize("cards", [(23, 23), (31, 23, 15), (95, 95), (7, 47)])
def test_llama_cpp_deals_the_layers_as_its_tensor_split_says(
    cards: tuple[int, ...], flash: Inventory, model: Footprint
) -> None:
    found = place(
        model_parts(model, flash.sizes_as("Q4_K_S"), ContextParams(8192)), [gib * GIB for gib in cards], 200 * GIB
    )
    assert found is not None
    # llama-model.cpp: split points are summed and divided in float32, and a layer goes to the first one above it.
    points = np.cumsum(np.float32(found.placement.tensor_split or ()), dtype=np.float32)
    points /= points[-1]
    layers = np.arange(49, dtype=np.float32) / np.float32(49)  # 45, 3 MTP blocks, the output
    assert np.bincount(np.searchsorted(points, layers, side="right"), minlength=len(cards)).tolist() == list(
        found.counts
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
