"""Budgets, from a checkpoint to the plan: what a file may take, what a token may read, and what rules leave open."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType

from stepgguf.cli.main import main
from stepgguf.convert import measure, sizes
from stepgguf.convert.budget import (
    REASON,
    UNIFORM,
    Limits,
    plan_within,
    plan_without_measuring,
    price_trunk,
    recipe_without_rules,
    resolve_recipe,
)
from stepgguf.convert.plan import Options, Plan, PlannedTensor
from stepgguf.convert.planner import plan_source
from stepgguf.convert.sources.checkpoint import Checkpoint
from stepgguf.convert.sources.gguf_file import GGUFSource
from stepgguf.errors import DoesNotFit, RecipeError
from stepgguf.files import folders
from stepgguf.fit import speed
from stepgguf.quants.recipe_files import load_recipe
from stepgguf.quants.recipe_grammar import parse_recipe
from tests.convert.test_objective import write_importance

T = GGMLQuantizationType
MIB = 2**20
DEST = Path("x.gguf")


@pytest.fixture(autouse=True)
def _few_types(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "MEASURED_TYPES", (T.IQ2_XS, T.Q2_K, T.Q4_K, T.Q8_0))


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Errors that one test measures are there for the others."""
    with pytest.MonkeyPatch.context() as patch:
        cache = tmp_path_factory.mktemp("cache")
        patch.setattr(folders, "measurements", lambda: cache)
        yield


def within(budget: Limits, source: Path, options: Options | None = None, type_name: str | None = None) -> Plan:
    chosen, limits = resolve_recipe(type_name, budget, "Q4_K_S")
    assert limits is not None
    options = replace(options or Options(load_recipe("F32")), recipe=chosen)
    with Checkpoint(source) if source.is_dir() else GGUFSource(source) as opened:
        plan = plan_without_measuring(limits, opened, DEST, options)
        return plan or plan_within(limits, opened, DEST, options, price_trunk(opened, DEST, options, threads=1))


def types(plan: Plan) -> Mapping[str, GGMLQuantizationType]:
    return {tensor.name: tensor.ggml_type for tensor in plan.tensors}


def whole(source: Path, type_name: str, mtp: str = "include") -> Plan:
    """All of the trunk as one type."""
    with Checkpoint(source) as checkpoint:
        return plan_source(
            checkpoint, Path("x.gguf"), Options(parse_recipe(f'default = "{type_name}"', type_name), mtp)
        )


def is_chosen(tensor: PlannedTensor) -> bool:
    return tensor.reason == REASON


@pytest.mark.slow
@pytest.mark.parametrize("mtp", ["include", "separate", "drop"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_all_files_fit_and_leave_no_room_for_another_step(share: float, mtp: str, small: Path) -> None:
    smallest, largest = (whole(small, type_name, mtp).file_bytes for type_name in ("Q2_K", "Q8_0"))
    size = int(smallest + share * (largest - smallest))
    plan = within(Limits(size), small, Options(load_recipe("F32"), mtp))
    steps = [t.bytes_as(T.Q8_0) - t.n_bytes for t in plan.tensors if is_chosen(t) and t.ggml_type != T.Q8_0]
    assert size - max(steps) < plan.file_bytes <= size
    assert {t.reason for t in plan.tensors if "nextn" in t.name and t.is_quantized} <= {"MTP Q8_0", "MTP file"}


@pytest.mark.slow
def test_headers_of_splits_are_paid_from_the_budget_too(small: Path) -> None:
    one = within(Limits(7 * MIB), small)
    plan = within(Limits(one.file_bytes), small, Options(load_recipe("F32"), split_max_size=MIB))
    assert len(plan.files) > 2
    assert plan.file_bytes <= one.file_bytes


def test_bits_per_weight_are_those_that_the_plan_shows(small: Path) -> None:
    plan = within(Limits(bpw=5.5), small)
    assert 5.4 < plan.bpw <= 5.5


@pytest.mark.slow
def test_a_larger_budget_costs_no_more(small: Path) -> None:
    with Checkpoint(small) as checkpoint:
        options = Options(recipe_without_rules("fit"))
        trunk = price_trunk(checkpoint, Path("x"), options, threads=1)
    losses = [trunk.predicted_loss(types(within(Limits(bpw=bpw), small))) or 0.0 for bpw in (4.7, 5, 5.5, 6, 7, 8, 9)]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] / 10 > losses[-1] > 0


def test_in_the_bytes_of_one_type_for_all_it_loses_less(small: Path) -> None:
    even = whole(small, "Q4_K")
    chosen = within(Limits(even.file_bytes), small)
    with Checkpoint(small) as checkpoint:
        trunk = price_trunk(checkpoint, DEST, Options(recipe_without_rules("fit")), threads=1)
    assert (trunk.predicted_loss(types(chosen)) or math.inf) < (trunk.predicted_loss(types(even)) or 0.0)
    assert trunk.predicted_loss(types(whole(small, "Q5_0"))) is None


def test_what_a_token_reads_is_what_plan_says_of_the_file(small: Path) -> None:
    with Checkpoint(small) as checkpoint:
        model, hp = sizes.take_inventory(checkpoint), checkpoint.hparams
    names = {t.name for t in model.tensors if not t.is_mtp}
    share = speed.expert_share(hp.n_expert_used, hp.n_expert, 1)

    def reads(plan: Plan) -> float:
        return speed.step_bytes([(t.name, t.n_bytes) for t in plan.tensors if t.name in names], share)

    free = within(Limits(bpw=6), small)
    limit = reads(free) * 0.85
    plan = within(Limits(bpw=6, read_bytes=limit), small)
    assert limit * 0.95 < reads(plan) <= limit
    assert plan.n_bytes < free.n_bytes
    assert types(plan)["token_embd.weight"] == T.Q8_0  # its rows are read for free


def test_rules_stay_and_floors_hold(small: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    rules = [
        'attn_output = "Q6_K"',
        '"ffn_*_exps" = { floor = "Q4_K" }',
        'attn_k = { floor = "BF16" }',
        'nextn = "Q4_K"',
    ]
    file.write_text("\n".join(["bpw = 5.2", *rules]))
    chosen, limits = resolve_recipe(str(file), None, "")
    assert limits == Limits(bpw=5.2)
    plans = [within(limits, small, type_name=str(file)), within(Limits(bpw=4.6), small, type_name=str(file))]
    for plan in plans:
        found = {tensor.name: tensor for tensor in plan.tensors}
        assert found["blk.3.attn_output.weight"].reason == "recipe line 2: attn_output"
        assert {t.ggml_type for t in plan.tensors if t.role.endswith("_exps")} <= {T.Q4_K, T.Q8_0}
        assert found["blk.5.nextn.eh_proj.weight"].ggml_type == T.Q4_K
        assert found["blk.3.attn_k.weight"].ggml_type == T.BF16
    assert any(t.ggml_type == T.Q2_K for t in plans[1].tensors)
    assert (plans[0].recipe.name, plans[1].recipe.name) == ("mine-5.2bpw", "mine-4.6bpw")
    assert chosen.name == "mine"


def test_a_stock_mixture_and_a_budget_exclude_each_other() -> None:
    with pytest.raises(RecipeError, match=r"Q4_K_M says the type of every tensor, and so does a budget \(fit-2GiB\)"):
        resolve_recipe("q4_k_m", Limits(2 * 2**30), "")


def test_no_budget_is_the_recipe_as_it_is() -> None:
    assert resolve_recipe(None, None, "Q4_K_S") == (load_recipe("Q4_K_S"), None)
    assert resolve_recipe("128gb", None, "Q4_K_S") == (load_recipe("128gb"), None)


def test_another_time_nothing_is_read_and_the_plan_is_the_same(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = within(Limits(bpw=5), small)
    monkeypatch.setattr(Checkpoint, "values", None)
    assert within(Limits(bpw=5), small) == first
    assert types(within(Limits(bpw=6), small)) != types(first)


@pytest.mark.slow
def test_without_an_imatrix_it_is_said_and_types_that_need_one_are_not_taken(small: Path, tmp_path: Path) -> None:
    without = within(Limits(bpw=4.7), small)
    assert UNIFORM in without.warnings
    assert T.IQ2_XS not in types(without).values()
    trunk = [t for t in whole(small, "Q8_0", "drop").tensors if t.is_quantized]
    options = Options(load_recipe("F32"), importance=write_importance(trunk, tmp_path / "imatrix.gguf", without="none"))
    with_it = within(Limits(bpw=4.7), small, options)
    assert UNIFORM not in with_it.warnings
    assert T.IQ2_XS in types(with_it).values()


@pytest.mark.slow
def test_a_gguf_gets_the_types_of_its_checkpoint(small: Path, tmp_path: Path) -> None:
    source = tmp_path / "bf16.gguf"
    assert main(["convert", str(small), str(source), "-t", "BF16", "-q"]) == 0
    budget = Limits(bpw=5)
    assert types(within(budget, source)) == types(within(budget, small))


def test_a_budget_that_nothing_fits_names_what_the_smallest_types_take(small: Path) -> None:
    least = whole(small, "Q2_K")
    with pytest.raises(DoesNotFit, match=r"fit-1MiB: with the smallest types the files have [\d,]+ bytes") as error:
        within(Limits(MIB), small)
    named = int(str(error.value).split("have ")[1].split(" ")[0].replace(",", ""))
    assert abs(named - least.file_bytes) < 1000  # headers name the recipe
    with pytest.raises(DoesNotFit, match=r"[KM]iB read for a token"):
        within(Limits(bpw=9, read_bytes=1000), small)


@pytest.mark.parametrize("mtp", ["include", "separate", "drop"])
def test_the_smallest_size_that_is_named_can_be_had_and_a_byte_less_cannot(
    mtp: str, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DoesNotFit) as error:
        within(Limits(1), small, Options(load_recipe("F32"), mtp))
    least = int(str(error.value).split("have ")[1].split(" ")[0].replace(",", ""))
    assert within(Limits(least), small, Options(load_recipe("F32"), mtp)).file_bytes <= least
    monkeypatch.setattr(Checkpoint, "values", None)  # refused before anything is read
    with pytest.raises(DoesNotFit):
        within(Limits(least - 100), small, Options(load_recipe("F32"), mtp))  # a shorter name may make a smaller header


def test_a_budget_that_holds_everything_is_not_measured(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Checkpoint, "values", None)
    plan = within(Limits(2**40), small)
    assert {t.ggml_type for t in plan.tensors if is_chosen(t)} == {T.Q8_0}
    assert any("the budget holds the largest types" in warning for warning in plan.warnings)


@pytest.mark.parametrize(
    ("budget", "name"),
    [
        (Limits(104 * 2**30), "fit-104GiB"),
        (Limits(int(109.1 * 2**30)), "fit-109.1GiB"),
        (Limits(6 * MIB), "fit-6MiB"),
        (Limits(bpw=4.2), "4.2bpw"),
        (Limits(104 * 2**30, read_bytes=9 * 2**30), "fit-104GiB-9GiB-a-token"),
    ],
)
def test_a_budget_has_a_name_for_files(budget: Limits, name: str) -> None:
    assert budget.name == name


# the command ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_convert_fit_writes_a_file_that_fits_with_a_proof(
    small: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(small), str(tmp_path), "--fit", "6.5MiB", "--threads", "1"]) == 0
    path = tmp_path / "small-fit-6.5MiB.gguf"
    assert path.stat().st_size <= 6.5 * MIB
    assert "without an importance matrix" in capfd.readouterr().err
    assert main(["verify", str(path), "--against", str(small), "-q"]) == 0


def test_a_name_that_is_taken_is_refused_before_anything_is_measured(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Checkpoint, "values", None)
    (tmp_path / "x.gguf").write_text("precious")
    assert main(["convert", str(small), str(tmp_path / "x.gguf"), "--fit", "6.5MiB", "-q"]) == 1
    assert "x.gguf exists" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--min-tps", "20"], "--min-tps needs --bandwidth"),
        (["--bandwidth", "200GB/s"], "--bandwidth needs --min-tps"),
        (["--fit", "much"], "'much' is not a size"),
        (["--fit", "1MiB"], "with the smallest types"),
        (["--fit", "1MiB", "-t", "Q4_K_M"], "Q4_K_M says the type of every tensor"),
    ],
)
def test_what_cannot_be_is_said_and_nothing_is_written(
    arguments: list[str], message: str, small: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(small), str(tmp_path / "x.gguf"), "-q", *arguments]) != 0
    assert message in " ".join(capfd.readouterr().err.replace("│", " ").split())
    assert not list(tmp_path.iterdir())
