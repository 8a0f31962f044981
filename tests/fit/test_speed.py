"""The byte model against published figures: sizes and speeds of real files, from the real model's shapes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np
import pytest

from benchmarks.speed_model import Prediction, median_error, predictions
from stepgguf.convert.sizes import Inventory, Sizes, take_inventory
from stepgguf.convert.sources.checkpoint import Checkpoint
from stepgguf.fit import catalogue
from stepgguf.fit.footprint import footprint_of
from stepgguf.fit.memory import memory_budget
from stepgguf.fit.planning import TargetMachine
from stepgguf.fit.speed import (
    SOURCE_ERROR,
    StepBytes,
    efficiency_range,
    expert_share,
    kv_read_bytes,
    mtp_gain,
    read_bytes,
    step_bytes,
)
from stepgguf.model.names import TensorName
from tests.cli.test_cli import sparse_checkpoint


@dataclass(frozen=True)
class Published:
    """A row of an independent calculation for this model. recipe: a stock type, or default/gate/up/down.

    gb: the trunk; dense, read: GB that a token reads; tps: at 273 GB/s, at 233 GB/s x 0.93 and at 800 GB/s; mtp: the
    gain for 1, 2 and 3 drafted tokens with one Q8_0 head each. The sizes of the two AesSedai rows are published files.
    """

    recipe: str
    gb: float
    dense: float
    read: float
    tps: tuple[float, float, float]
    mtp: tuple[float, float, float]


TABLE = [
    Published("Q3_K_M", 93.80, 3.40, 5.90, (46.3, 36.7, 135.6), (1.21, 1.21, 1.16)),
    Published("IQ4_XS", 105.48, 3.66, 6.48, (42.1, 33.4, 123.5), (1.21, 1.21, 1.17)),
    Published("Q4_K_S", 111.49, 3.80, 6.78, (40.2, 32.0, 117.9), (1.21, 1.21, 1.17)),
    Published("Q4_K_M", 118.58, 3.87, 7.04, (38.8, 30.8, 113.6), (1.20, 1.20, 1.16)),
    Published("MXFP4_MOE", 108.34, 6.71, 9.51, (28.7, 22.8, 84.1), (1.37, 1.45, 1.46)),
    Published("Q8_0/IQ3_S/IQ3_S/IQ4_XS", 95.46, 6.71, 9.16, (29.8, 23.7, 87.4), (1.39, 1.49, 1.50)),  # AesSedai IQ4_XS
    Published("Q8_0/Q4_K/Q4_K/Q5_K", 122.21, 6.71, 9.90, (27.6, 21.9, 80.8), (1.34, 1.42, 1.41)),  # AesSedai Q4_K_M
    Published("Q6_K/IQ3_S/IQ3_S/IQ4_XS", 93.85, 5.22, 7.67, (35.6, 28.3, 104.3), (1.32, 1.38, 1.37)),
    Published("Q5_K/IQ3_S/IQ3_S/IQ4_XS", 92.96, 4.41, 6.86, (39.8, 31.6, 116.6), (1.28, 1.31, 1.29)),
]
# Tokens of a step with 1, 2 and 3 drafts: what the table's last columns imply, the same for all of its rows.
YIELD = (1.88, 2.54, 3.07)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkpoint]:
    with Checkpoint(sparse_checkpoint(tmp_path_factory.mktemp("speed") / "Step-3.5-Flash")) as checkpoint:
        yield checkpoint


@pytest.fixture(scope="module")
def flash(real: Checkpoint) -> Inventory:
    return take_inventory(real)


def sizes(flash: Inventory, recipe: str, folder: Path) -> Sizes:
    if "/" not in recipe:
        return flash.sizes_as(recipe)
    default, gate, up, down = recipe.split("/")
    path = folder / "recipe.toml"
    path.write_text(
        f'default = "{default}"\nffn_gate_exps = "{gate}"\nffn_up_exps = "{up}"\nffn_down_exps = "{down}"\n'
    )
    return flash.sizes_as(str(path))


def step(found: Sizes, n_tokens: int = 1) -> float:
    return step_bytes(found.trunk, expert_share(8, 288, n_tokens))


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.recipe)
def test_bytes_and_speeds_are_those_of_an_independent_table(row: Published, flash: Inventory, tmp_path: Path) -> None:
    found = sizes(flash, row.recipe, tmp_path)
    read = step(found)
    assert round((found.total - found.mtp) / 1e9, 2) == row.gb
    assert round(step_bytes(found.trunk, 0.0) / 1e9, 2) == row.dense
    assert round(read / 1e9, 2) == row.read
    assert (round(273e9 / read, 1), round(800e9 / read, 1)) == (row.tps[0], row.tps[2])
    assert round(233 * 0.93 / round(read / 1e9, 2), 1) == row.tps[1]  # made from the rounded figure
    gains = [mtp_gain(read, step(found, 1 + n), n * found.mtp / 3, tokens) for n, tokens in enumerate(YIELD, 1)]
    assert tuple(round(gain, 2) for gain in gains) == row.mtp


F16, Q8_0 = 1.0, 34 / 64  # of the KV cache's bytes, as F16 counts them
AES = "Q8_0/IQ3_S/IQ3_S/IQ4_XS"
# The file of each published run, in the list's order, and its KV cache.
RUNS = {
    "spark": [(AES, F16)] + [("Q4_K_S", F16)] + [("Q4_K_S", Q8_0)] * 7,
    "strix-128": [("IQ4_XS", F16)] * 2 + [("Q4_K_S", F16)],
    "mac-128": [("IQ4_XS", F16)] * 2 + [("Q4_K_S", F16)],
    "mac-128-m4-max": [("Q4_K_S", F16)] * 6,
}


@pytest.mark.parametrize("machine", RUNS)
def test_the_bytes_of_a_published_speed_are_those_of_its_file(
    machine: str, real: Checkpoint, flash: Inventory, tmp_path: Path
) -> None:
    model = footprint_of(real)
    for (recipe, cache), published in zip(RUNS[machine], catalogue.load_catalogue()[machine].measured, strict=True):
        read = step(sizes(flash, recipe, tmp_path)) + cache * kv_read_bytes(model, published.depth)
        assert published.read == round(read / 1e9, 3) * 1e9


def test_every_published_speed_has_its_bytes_checked() -> None:
    measured = {machine.measured for machine in catalogue.load_catalogue().values() if machine.measured}
    assert sum(map(len, measured)) == sum(map(len, RUNS.values())) == len(predictions()) == 21


@pytest.mark.parametrize("prediction", predictions(), ids=lambda p: f"{p.machine.name}-{p.published.tps:g}")
def test_every_published_speed_is_in_the_range_that_is_printed_for_it(prediction: Prediction) -> None:
    machine, published = prediction.machine, prediction.published
    speed = TargetMachine("", machine.machine, memory_budget(machine.machine), machine).generation_speed(
        StepBytes(published.read)
    )
    assert speed.tps is not None
    low, high = speed.tps
    assert low <= published.tps * (1 + 1e-12)
    assert published.tps <= high * (1 + 1e-12)
    assert high - low >= 2 * SOURCE_ERROR * machine.bandwidth * median(machine.efficiencies) / published.read * 0.999


def test_the_stated_errors_are_those_of_the_list() -> None:
    found = predictions()
    assert round(median_error(p.source_error for p in found), 2) == SOURCE_ERROR
    depth_errors = [p.depth_error for p in found if p.depth_error is not None]
    assert len(depth_errors) == 17
    assert round(median_error(depth_errors), 3) == 0.025
    assert max(map(abs, depth_errors)) == pytest.approx(0.24, abs=0.005)
    assert max(abs(p.source_error) for p in found if p.source_error is not None) == pytest.approx(0.59, abs=0.005)


def test_a_prediction_does_not_know_what_it_predicts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A figure that is twice as fast is predicted as before: by the others of its run, and by other sources."""
    entries = catalogue.load_catalogue()
    machine = entries["mac-128"]
    first, *others = machine.measured
    twice = replace(machine, measured=(replace(first, tps=2 * first.tps), *others))
    before = predictions()
    monkeypatch.setattr("benchmarks.speed_model.load_catalogue", lambda: {"mac-128": twice})
    after = next(p for p in predictions() if p.published.depth == first.depth)
    assert after.published.tps == 72
    assert [(p.by_depth, p.by_source) for p in before if p.published is first or p.published == first] == [
        (after.by_depth, after.by_source)
    ]


def test_one_efficiency_explains_an_empty_and_a_long_context() -> None:
    """36 tok/s and, after 100,000 tokens, 20 were measured on an M1 Ultra; the KV cache makes the difference."""
    empty, long, _ = catalogue.load_catalogue()["mac-128"].measured
    predicted = empty.tps * empty.read / long.read
    assert predicted == pytest.approx(long.tps, rel=0.02)  # 20 is published without decimals: 19.5 to 20.5 is 2.5 %


def test_two_places_are_read_one_after_the_other() -> None:
    step = StepBytes(ram=4e9, cards=9e9)
    assert step.total == 13e9
    assert step.seconds(80e9, 900e9) == pytest.approx(0.05 + 0.01)
    assert step.seconds(80e9, None) == pytest.approx(0.05), "an unknown place takes no less than nothing"
    assert StepBytes(ram=0.0, cards=9e9).seconds(80e9, None) is None


def test_the_range_is_what_was_measured_and_at_least_the_error_of_sources() -> None:
    assert efficiency_range((0.5,)) == pytest.approx((0.5 * (1 - SOURCE_ERROR), 0.5 * (1 + SOURCE_ERROR)))
    assert efficiency_range((0.2, 0.5, 0.9)) == (0.2, 0.9)


@pytest.mark.slow
@pytest.mark.parametrize("n_tokens", [1, 2, 3, 4])
def test_the_share_of_experts_is_what_independent_tokens_choose(n_tokens: int) -> None:
    rng, n_draws = np.random.default_rng(0), 4000
    union = [len({e for _ in range(n_tokens) for e in rng.choice(288, 8, replace=False)}) for _ in range(n_draws)]
    error = np.std(union) / 288 / n_draws**0.5
    assert expert_share(8, 288, n_tokens) == pytest.approx(np.mean(union) / 288, abs=5 * error + 1e-12)


def test_a_byte_costs_what_it_is_read() -> None:
    assert read_bytes(TensorName("blk.3.ffn_down_exps.weight"), 36, 8 / 288) == 1.0
    assert read_bytes(TensorName("blk.3.ffn_down_shexp.weight"), 36, 8 / 288) == 36
    assert read_bytes(TensorName("output.weight"), 36, 8 / 288) == 36
    assert read_bytes(TensorName("token_embd.weight"), 36, 8 / 288) == 0


def test_a_token_reads_all_cells_of_full_layers_and_the_window_of_the_others(real: Checkpoint) -> None:
    model = footprint_of(real)
    row = 8 * 2 * 128 * 2  # bytes of a cell: 8 heads, K and V, F16
    assert kv_read_bytes(model, 0) == 0
    assert kv_read_bytes(model, 256) == 45 * 256 * row
    assert kv_read_bytes(model, 131072) == (12 * 131072 + 33 * 512) * row
