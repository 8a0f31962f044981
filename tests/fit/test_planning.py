"""The real model on real machines, against the plan of `convert`, the memory arithmetic and published speeds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from stepgguf.cli.plan_text import closing_notes
from stepgguf.convert.plan import Options
from stepgguf.convert.planner import plan_source
from stepgguf.convert.sources.checkpoint import Checkpoint
from stepgguf.convert.sources.gguf_file import GGUFSource
from stepgguf.convert.sources.opening import open_source
from stepgguf.files.byte_sizes import GIB
from stepgguf.fit.footprint import footprint_of
from stepgguf.fit.memory import ContextParams, memory_budget, memory_need
from stepgguf.fit.planning import (
    OWN_TYPES,
    MachinePlan,
    PlanRow,
    TargetMachine,
    described_box,
    plan_for_machine,
    target_machine,
)
from stepgguf.quants.recipe_files import load_recipe
from tests.cli.test_cli import sparse_checkpoint
from tests.fit.machines import CARD, MAC
from tests.fit.test_memory import write_real

CTX = 131072


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sparse_checkpoint(tmp_path_factory.mktemp("plan") / "Step-3.5-Flash")


@pytest.fixture(scope="module")
def real_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_real(tmp_path_factory.mktemp("plan-gguf"))


def plan(path: Path, target: TargetMachine, context: ContextParams, *names: str) -> MachinePlan:
    with open_source(path) as source:
        return plan_for_machine(source, target, context, names or None)


def rows(path: Path, machine: str, *names: str, ctx: int = CTX, mtp: bool = True) -> dict[str, PlanRow]:
    result = plan(path, target_machine(machine), ContextParams(ctx, mtp=mtp), *names)
    return {row.type: row for row in result.rows}


# sizes --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Q4_K_S", "Q3_K_M", "MXFP4_MOE", "Q8_0", "BF16"])
@pytest.mark.parametrize("mtp", ["include", "drop"])
def test_weights_are_what_convert_would_write(name: str, mtp: str, real: Path) -> None:
    with Checkpoint(real) as checkpoint:
        file_plan = plan_source(checkpoint, Path("x.gguf"), Options(load_recipe(name), mtp))
    row = rows(real, "spark", name, mtp=mtp == "include")[name]
    assert (row.weights, row.bpw) == (file_plan.n_bytes, file_plan.bpw)


@pytest.mark.slow
def test_a_gguf_gives_the_rows_of_its_checkpoint_and_one_of_its_own(real: Path, real_gguf: Path) -> None:
    theirs, ours = rows(real_gguf, "spark"), rows(real, "spark")
    own = theirs.pop(OWN_TYPES)
    assert theirs == ours
    assert replace(own, type="Q4_K_S") == ours["Q4_K_S"]


@pytest.mark.slow
def test_types_that_need_an_importance_matrix_are_marked_and_have_the_size_that_it_gives(real: Path) -> None:
    found = rows(real, "spark", "IQ3_XXS", "IQ4_XS", "Q2_K_S", mtp=False)
    assert {name: row.needs_imatrix for name, row in found.items()} == {
        "IQ3_XXS": True, "IQ4_XS": False, "Q2_K_S": True,
    }  # fmt: skip
    assert round(found["IQ3_XXS"].weights / 1e9, 2) == 75.75  # 79.16 without


# what fits ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("machine", ["spark", "mac-128", "strix-128", "mac-64"])
def test_what_fits_is_what_the_memory_arithmetic_says(machine: str, real: Path, real_gguf: Path) -> None:
    context = ContextParams(CTX)
    target = target_machine(machine)
    result = plan(real, target, context)
    with GGUFSource(real_gguf) as source:
        model = footprint_of(source)
    for row in result.rows:
        needed = memory_need(replace(model, weights=row.weights), context)
        assert row.total == needed.total
        assert row.fits == (needed.device <= target.budget.limit and needed.total <= target.budget.ceiling)
        assert row.fits == (row.weights <= result.room) == (row.n_ctx is not None and row.n_ctx >= CTX)
    assert result.best is max((row for row in result.rows if row.fits), key=lambda row: row.weights, default=None)


@pytest.mark.slow
def test_the_longest_context_fits_and_a_longer_one_does_not(real: Path) -> None:
    n_ctx = rows(real, "spark", "Q4_K_M")["Q4_K_M"].n_ctx
    assert n_ctx is not None
    assert rows(real, "spark", "Q4_K_M", ctx=n_ctx)["Q4_K_M"].fits
    assert not rows(real, "spark", "Q4_K_M", ctx=n_ctx + 1024)["Q4_K_M"].fits


@pytest.mark.slow
@pytest.mark.parametrize(
    ("machine", "name", "ctx"),
    [
        ("spark", "128gb", 131072),
        ("strix-128", "128gb", 131072),
        ("mac-128", "128gb", 131072),
        ("mac-192", "192gb", 262144),
        ("mac-96", "96gb", 65536),
        ("mac-64", "64gb", 32768),
    ],
)
def test_a_shipped_recipe_fits_its_machine(machine: str, name: str, ctx: int, real: Path) -> None:
    assert rows(real, machine, name, ctx=ctx)[name].fits


@pytest.mark.parametrize(("wired", "capacity"), [(110, 112), (116, 118), (119, 120)])
def test_kept_conversations_are_beside_what_a_mac_gives_its_gpu(wired: int, capacity: int) -> None:
    mac = replace(MAC, wired_limit=wired * GIB)
    assert (
        TargetMachine("mac", mac, memory_budget(mac), None).capacity(ContextParams(4096, cache_ram=2 * GIB))
        == capacity * GIB
    )


def test_a_gpu_of_its_own_leaves_the_rest_in_ram() -> None:
    target = TargetMachine("cards", CARD, memory_budget(CARD), None)
    assert target.capacity(ContextParams(4096)) == (80 - 1 + 256 - 4) * GIB
    assert (target.devices, target.ram) == ((79 * GIB,), 252 * GIB)


# cards and several machines -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("machine", ["cuda-24-64", "cuda-32-128", "cuda-48-256", "cuda-96-64"])
def test_a_row_of_a_box_with_a_card_is_placed_or_does_not_fit(machine: str, real: Path) -> None:
    target, context = target_machine(machine), ContextParams(32768)
    result = plan(real, target, context, "64gb", "IQ4_XS", "Q4_K_S", "Q8_0")
    (card,) = target.devices
    for row in result.rows:
        assert row.fits == (row.placed is not None) == (row.n_ctx is not None and row.n_ctx >= context.n_ctx)
        assert row.fits or row.weights > result.room
        if row.placed is not None:
            assert row.placed.cards[0] <= card
            assert row.placed.ram <= target.ram
            assert row.total == row.placed.cards[0] + row.placed.ram
            assert row.weights < row.total
            assert row.empty.tps is None
            assert row.empty.ceiling_tps is not None
    assert result.rows[0].fits


@pytest.mark.slow
def test_the_longest_context_of_a_card_fits_and_a_longer_one_does_not(real: Path) -> None:
    n_ctx = rows(real, "cuda-24-128", "Q5_K_M", ctx=32768)["Q5_K_M"].n_ctx
    assert n_ctx is not None
    assert 32768 < n_ctx < 262144
    assert rows(real, "cuda-24-128", "Q5_K_M", ctx=n_ctx)["Q5_K_M"].fits
    assert not rows(real, "cuda-24-128", "Q5_K_M", ctx=n_ctx + 1024)["Q5_K_M"].fits


def test_a_token_is_read_from_the_card_and_from_ram_one_after_the_other(real: Path, tmp_path: Path) -> None:
    """By hand, all in Q4_K: 8 of 288 experts, with those of N - 3 layers in RAM (the first three have none)."""
    (tmp_path / "q4.toml").write_text('default = "Q4_K"\n')
    row = rows(real, "cuda-24-128", str(tmp_path / "q4.toml"), ctx=32768)[str(tmp_path / "q4.toml")]
    assert row.placed is not None
    in_ram = (row.placed.n_cpu_moe - 3) * 3 * 8 * 1280 * 4096 * 144 / 256
    assert row.empty.ceiling_tps == pytest.approx(1 / (in_ram / 89.6e9 + (row.empty.read - in_ram) / 936e9))
    cache = row.full.read - row.empty.read
    assert cache == (12 * 32768 + 33 * 512) * 4096
    assert row.full.ceiling_tps == pytest.approx(1 / (1 / row.empty.ceiling_tps + cache / 936e9))


def test_two_sparks_hold_twice_as_much_and_are_no_faster_than_one(real: Path) -> None:
    one, two = (rows(real, name, "Q4_K_S", "Q8_0") for name in ("spark", "spark-2"))
    assert (one["Q8_0"].fits, two["Q8_0"].fits) == (False, True)
    placed = two["Q8_0"].placed
    assert placed is not None
    assert (placed.n_cpu_moe, placed.ram, sum(placed.counts)) == (0, 0, 49)
    assert max(placed.cards) <= 117.7 * GIB
    assert two["Q4_K_S"].empty.tps is None, "no speed of two is published"
    assert two["Q4_K_S"].empty.ceiling_tps == one["Q4_K_S"].empty.ceiling_tps


def test_of_a_box_that_nobody_listed_the_cards_are_not_counted_in_the_ceiling(real: Path) -> None:
    cards, context = (24 * GIB, 24 * GIB), ContextParams(32768)
    (known,) = plan(real, described_box(cards, 128 * GIB, 90e9), context, "Q4_K_S").rows
    (unknown,) = plan(real, described_box(cards, 128 * GIB, None), context, "Q4_K_S").rows
    assert known.placed is not None
    assert known.placed == unknown.placed
    in_ram = sum(known.placed.n_cpu_moe > i for i in range(3, 45))
    assert known.empty.ceiling_tps == known.full.ceiling_tps
    assert known.empty.ceiling_tps is not None
    assert 90e9 / known.empty.ceiling_tps == pytest.approx(in_ram * 8 / 288 * 2.55e9, rel=0.03)  # a layer's: 2.55 GB
    assert (unknown.empty.ceiling_tps, unknown.mtp_gain, known.mtp_gain) == (None, None, None)


# speed --------------------------------------------------------------------------------------------------------------


def test_a_published_speed_is_predicted_where_it_was_published(real: Path, tmp_path: Path) -> None:
    (tmp_path / "aes.toml").write_text('default = "Q8_0"\n"ffn_{gate,up}_exps" = "IQ3_S"\nffn_down_exps = "IQ4_XS"\n')
    row = rows(real, "spark", str(tmp_path / "aes.toml"))[str(tmp_path / "aes.toml")]
    assert row.empty.tps is not None
    assert row.empty.tps[1] == pytest.approx(23.7, rel=0.0001)  # its bytes are in the list with 4 digits
    at_100k = rows(real, "mac-128", "IQ4_XS", ctx=100_000)["IQ4_XS"]
    assert at_100k.full.tps is not None
    assert sum(at_100k.full.tps) / 2 == pytest.approx(20, rel=0.02)


@pytest.mark.slow
def test_where_nothing_is_published_there_is_a_ceiling_and_no_prediction(real: Path) -> None:
    row = rows(real, "mac-192", "Q4_K_S")["Q4_K_S"]
    assert (row.empty.tps, row.full.tps) == (None, None)
    assert row.empty.ceiling_tps == pytest.approx(800e9 / row.empty.read)
    text = "\n".join(closing_notes(plan(real, target_machine("mac-192"), ContextParams(CTX), "Q4_K_S")))
    assert "no measurement of this model is published" in text
    assert "estimate" not in text


@pytest.mark.slow
def test_without_mtp_blocks_there_is_no_gain(real: Path) -> None:
    gain = rows(real, "spark", "Q4_K_S")["Q4_K_S"].mtp_gain
    assert gain is not None
    assert 1.0 < gain[0] < gain[1]
    assert rows(real, "spark", "Q4_K_S", mtp=False)["Q4_K_S"].mtp_gain is None
