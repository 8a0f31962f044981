"""stepgguf plan: the real model on real machines, against the plan of `convert` and the memory arithmetic."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType as T

from stepgguf.cli import planning
from stepgguf.cli.arguments import parse_size
from stepgguf.cli.main import main
from stepgguf.cli.plan import notes
from stepgguf.cli.planning import OWN, Place, Row, place, planned
from stepgguf.convert import measure
from stepgguf.convert.budget import Limits, resolve, settled
from stepgguf.convert.plan import Options
from stepgguf.convert.planner import plan_source
from stepgguf.convert.sources.checkpoint import Checkpoint
from stepgguf.convert.sources.gguf_file import GGUFSource
from stepgguf.errors import DoesNotFit
from stepgguf.files import folders
from stepgguf.fit import catalogue
from stepgguf.fit.footprint import footprint
from stepgguf.fit.memory import GIB, Context, budget, need
from stepgguf.quants.recipe_files import load_recipe
from tests.cli.test_cli import sparse_checkpoint
from tests.cli.test_doctor import CARD, MAC
from tests.fit.test_memory import write_real

CTX = 131072


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sparse_checkpoint(tmp_path_factory.mktemp("plan") / "Step-3.5-Flash")


@pytest.fixture(scope="module")
def real_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_real(tmp_path_factory.mktemp("plan-gguf"))


def rows(path: Path, machine: str, *names: str, ctx: int = CTX, mtp: bool = True) -> dict[str, Row]:
    result = planned(path, place(machine), Context(ctx, mtp=mtp), names or None)
    return {row.type: row for row in result.rows}


# sizes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Q4_K_S", "Q3_K_M", "MXFP4_MOE", "Q8_0", "BF16"])
@pytest.mark.parametrize("mtp", ["include", "drop"])
def test_weights_are_what_convert_would_write(name: str, mtp: str, real: Path) -> None:
    with Checkpoint(real) as checkpoint:
        plan = plan_source(checkpoint, Path("x.gguf"), Options(load_recipe(name), mtp))
    row = rows(real, "spark", name, mtp=mtp == "include")[name]
    assert (row.weights, row.bpw) == (plan.n_bytes, plan.bpw)


def test_a_gguf_gives_the_rows_of_its_checkpoint_and_one_of_its_own(real: Path, real_gguf: Path) -> None:
    theirs, ours = rows(real_gguf, "spark"), rows(real, "spark")
    own = theirs.pop(OWN)
    assert theirs == ours
    assert replace(own, type="Q4_K_S") == ours["Q4_K_S"]


def test_types_that_need_an_importance_matrix_are_marked_and_have_the_size_that_it_gives(real: Path) -> None:
    found = rows(real, "spark", "IQ3_XXS", "IQ4_XS", "Q2_K_S", mtp=False)
    assert {name: row.needs_imatrix for name, row in found.items()} == {
        "IQ3_XXS": True, "IQ4_XS": False, "Q2_K_S": True,
    }  # fmt: skip
    assert round(found["IQ3_XXS"].weights / 1e9, 2) == 75.75  # 79.16 without


# what fits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("machine", ["spark", "mac-128", "strix-128", "mac-64"])
def test_what_fits_is_what_the_memory_arithmetic_says(machine: str, real: Path, real_gguf: Path) -> None:
    context = Context(CTX)
    where = place(machine)
    result = planned(real, where, context, None)
    with GGUFSource(real_gguf) as source:
        model = footprint(source)
    for row in result.rows:
        needed = need(replace(model, weights=row.weights), context)
        assert row.total == needed.total
        assert row.fits == (needed.device <= where.have.limit and needed.total <= where.have.ceiling)
        assert row.fits == (row.weights <= result.room) == (row.n_ctx is not None and row.n_ctx >= CTX)
    assert result.best is max((row for row in result.rows if row.fits), key=lambda row: row.weights, default=None)


def test_the_longest_context_fits_and_a_longer_one_does_not(real: Path) -> None:
    n_ctx = rows(real, "spark", "Q4_K_M")["Q4_K_M"].n_ctx
    assert n_ctx is not None
    assert rows(real, "spark", "Q4_K_M", ctx=n_ctx)["Q4_K_M"].fits
    assert not rows(real, "spark", "Q4_K_M", ctx=n_ctx + 1024)["Q4_K_M"].fits


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
    assert Place("mac", mac, budget(mac), None).capacity(Context(4096, cache_ram=2 * GIB)) == capacity * GIB


def test_a_gpu_of_its_own_leaves_the_rest_in_ram() -> None:
    where = Place("cards", CARD, budget(CARD), None)
    assert where.capacity(Context(4096)) == (80 - 1 + 256 - 4) * GIB


# speed --------------------------------------------------------------------------------------------------------------


def test_a_published_speed_is_predicted_where_it_was_published(real: Path, tmp_path: Path) -> None:
    (tmp_path / "aes.toml").write_text('default = "Q8_0"\n"ffn_{gate,up}_exps" = "IQ3_S"\nffn_down_exps = "IQ4_XS"\n')
    row = rows(real, "spark", str(tmp_path / "aes.toml"))[str(tmp_path / "aes.toml")]
    assert row.empty.tps is not None
    assert row.empty.tps[1] == pytest.approx(23.7, rel=0.0001)  # its bytes are in the list with 4 digits
    at_100k = rows(real, "mac-128", "IQ4_XS", ctx=100_000)["IQ4_XS"]
    assert at_100k.full.tps is not None
    assert at_100k.full.tps[0] == pytest.approx(20, rel=0.0001)


def test_where_nothing_is_published_there_is_a_ceiling_and_no_prediction(real: Path) -> None:
    row = rows(real, "strix-128", "Q4_K_S")["Q4_K_S"]
    assert (row.empty.tps, row.full.tps) == (None, None)
    assert row.empty.ceiling_tps == pytest.approx(212e9 / row.empty.read)
    text = "\n".join(notes(planned(real, place("strix-128"), Context(CTX), ["Q4_K_S"])))
    assert "no measurement of this model is published" in text
    assert "estimate" not in text


def test_without_mtp_blocks_there_is_no_gain(real: Path) -> None:
    gain = rows(real, "spark", "Q4_K_S")["Q4_K_S"].mtp_gain
    assert gain is not None
    assert 1.0 < gain[0] < gain[1]
    assert rows(real, "spark", "Q4_K_S", mtp=False)["Q4_K_S"].mtp_gain is None


# the command --------------------------------------------------------------------------------------------------------


def run(capfd: pytest.CaptureFixture[str], *arguments: object) -> str:
    capfd.readouterr()
    assert main(["plan", *map(str, arguments)]) == 0
    return capfd.readouterr().out


@pytest.mark.parametrize("machine", catalogue.load())
def test_the_table_fits_a_terminal_of_80_columns(machine: str, real: Path, capfd: pytest.CaptureFixture[str]) -> None:
    first, *lines = run(capfd, real, "--machine", machine, "--ctx", CTX, "--parallel", 4).splitlines()
    assert first == str(real)
    assert max(map(len, lines)) <= 80
    assert any(line.startswith("Q4_K_S ") for line in lines)


def test_the_lines_above_the_table_add_up(real: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lines = run(capfd, real, "-m", "spark", "--ctx", CTX, "--types", "Q4_K_S").splitlines()[3:10]
    have, *parts, left = (float(line[1:].split()[0]) for line in lines)
    assert lines[-1].startswith("= ")
    assert have - sum(parts) == pytest.approx(left, abs=0.005 * len(lines))  # each line is rounded to 0.01
    assert f"--fit {int(left * 10) / 10}GiB" in lines[-1]


@pytest.mark.parametrize(
    ("machine", "ctx", "suggestion"),
    [
        ("spark", 131072, "convert --fit 109.1GiB"),
        ("mac-64", 1024, "convert --fit 53.5GiB --imatrix FILE"),  # too little for the types that need none
        ("mac-64", 131072, "the smallest types take 49.9 GiB"),
    ],
)
def test_a_budget_is_suggested_only_where_it_can_be_had(
    machine: str, ctx: int, suggestion: str, real: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert f"for weights: {suggestion}\n" in run(capfd, real, "-m", machine, "--ctx", ctx, "--types", "Q4_K_S")


def test_what_is_suggested_is_enough_without_an_imatrix_or_not_as_it_says(real: Path) -> None:
    recipe, _ = resolve(None, Limits(1), "")
    with Checkpoint(real) as checkpoint:
        enough, too_little = (Limits(parse_size(size)) for size in ("109.1GiB", "53.5GiB"))
        assert settled(enough, checkpoint, Path("x.gguf"), Options(recipe)) is None  # something is left to choose
        with pytest.raises(DoesNotFit):
            settled(too_little, checkpoint, Path("x.gguf"), Options(recipe))


def test_json_says_the_same(real: Path, capfd: pytest.CaptureFixture[str]) -> None:
    report: dict[str, Any] = json.loads(run(capfd, real, "-m", "spark", "--types", "q4_k_s, IQ4_XS", "--json"))
    assert [row["type"] for row in report["rows"]] == ["IQ4_XS", "q4_k_s"]
    assert report["machine"]["capacity"] - report["room"] == sum(report["need"].values())
    assert report["context"]["n_ctx"] == 32768
    assert report["machine"]["measured"][0]["tps"] == 23.7


def test_this_machine_and_a_small_model(small: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = run(capfd, small, "--ctx", 1024)
    assert text.startswith(f"{small}\non this machine, 1,024 tokens of context, 1 request at a time\n")
    assert "The largest that fits is Q8_0." in text


def test_measured_rows_have_a_loss_and_rows_of_fit_lose_least(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(folders, "errors", lambda: tmp_path)
    monkeypatch.setattr(measure, "MEASURED_TYPES", [T.Q2_K, T.Q4_K, T.Q8_0])
    options = ["-m", "spark", "--ctx", 1024, "--measure", "--threads", 1]
    report = json.loads(run(capfd, small, *options, "--types", "Q8_0,Q6_K", "--json"))
    found = {row["type"]: row for row in report["rows"]}
    fit = [row for name, row in found.items() if name.startswith("fit ")]
    assert len(fit) == planning.FRONTIER
    for row in fit:
        assert row["weights"] < parse_size(row["type"].removeprefix("fit "))
    losses = [row["loss"] for row in fit]
    assert losses == sorted(losses, reverse=True)
    assert 0 < found["Q8_0"]["loss"] < losses[0]
    assert found["Q6_K"]["loss"] is None  # not measured here
    text = run(capfd, small, *options, "--types", "Q8_0,Q6_K")
    assert "  loss\n" in text
    assert "The least predicted loss that fits is Q8_0." in text
    size = parse_size(fit[2]["type"].removeprefix("fit "))
    out = tmp_path / "x.gguf"
    assert main(["convert", str(small), str(out), "--fit", str(size), "--threads", "1", "-q"]) == 0
    with GGUFSource(out) as made:
        assert sum(t.n_bytes for header in made.headers for t in header.tensors) == fit[2]["weights"]


def test_an_imatrix_is_for_measuring(small: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(small), "--imatrix", str(small / "config.json")]) == 2
    assert "--imatrix is for --measure" in capfd.readouterr().err


def test_a_context_beyond_the_trained_one_is_a_warning(small: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(small), "--types", "Q8_0", "--ctx", "5000"]) == 0
    assert "5,000 tokens are more than the 4,096 it was trained for" in capfd.readouterr().err


def test_a_machine_that_is_too_small_says_so(real: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert "None of these fits." in run(capfd, real, "-m", "mac-64", "--types", "Q8_0")


def test_an_unknown_machine_gets_the_nearest_and_the_list(real: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(real), "--machine", "Spark1"]) == 2
    text = " ".join(capfd.readouterr().err.replace("│", " ").split())
    assert "'Spark1' is not a machine; did you mean spark? Known: auto, spark, strix-128, mac-128," in text


@pytest.mark.parametrize(
    ("types", "text"), [("Q4_K_Z", "did you mean Q4_K_S?"), ("./none.toml", "none.toml: no such file\n")]
)
def test_an_unknown_type_or_recipe_is_an_error(
    types: str, text: str, real: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(real), "-m", "spark", "--types", types]) == 1
    assert text in capfd.readouterr().err


def test_an_empty_list_of_types_is_wrong_usage(real: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(real), "-m", "spark", "--types", " ,"]) == 2
    assert "names no type" in capfd.readouterr().err


def test_it_is_quick(real: Path) -> None:
    """Processor time, as this machine may be busy: all rows of the real model."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "stepgguf", "plan", str(real), "-m", "spark", "--ctx", str(CTX)]
    subprocess.run(command, capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2.0
