"""stepgguf plan: what it prints of the real model on real machines."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType as T

from stepgguf.cli.arguments import Cards, parse_size
from stepgguf.cli.main import main
from stepgguf.cli.plan_text import next_command
from stepgguf.convert import measure
from stepgguf.convert.budget import Limits, plan_without_measuring, resolve_recipe
from stepgguf.convert.plan import Options
from stepgguf.convert.sources.checkpoint import Checkpoint
from stepgguf.convert.sources.gguf_file import GGUFSource
from stepgguf.convert.sources.opening import open_source
from stepgguf.errors import DoesNotFit
from stepgguf.files import folders
from stepgguf.files.byte_sizes import GIB, MIB
from stepgguf.fit import catalogue, planning
from stepgguf.fit.memory import ContextParams
from stepgguf.fit.planning import TargetMachine, described_box, plan_for_machine, target_machine
from tests.cli.test_cli import sparse_checkpoint

CTX = 131072


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sparse_checkpoint(tmp_path_factory.mktemp("plan") / "Step-3.5-Flash")


# the command --------------------------------------------------------------------------------------------------------


def run(capfd: pytest.CaptureFixture[str], *arguments: object) -> str:
    capfd.readouterr()
    assert main(["plan", *map(str, arguments)]) == 0
    return capfd.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("machine", catalogue.load_catalogue())
def test_the_table_fits_a_terminal_of_80_columns(machine: str, real: Path, capfd: pytest.CaptureFixture[str]) -> None:
    types = "IQ2_XXS,MXFP4_MOE,Q4_K_S,Q8_0"  # long names, small and large sizes
    options = "--ctx", CTX, "--parallel", 4, "--types", types
    first, *lines = run(capfd, real, "--machine", machine, *options).splitlines()
    assert first == str(real)
    assert max(map(len, lines)) <= 80
    assert any(line.startswith("Q4_K_S ") for line in lines)


def test_the_lines_above_the_table_add_up(real: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lines = run(capfd, real, "-m", "spark", "--ctx", CTX, "--types", "Q4_K_S").splitlines()[3:10]
    have, *parts, left = (float(line[1:].split()[0]) for line in lines)
    assert lines[-1].startswith("= ")
    assert have - sum(parts) == pytest.approx(left, abs=0.005 * len(lines))  # each line is rounded to 0.01
    assert f"--fit {int(left * 10) / 10}GiB" in lines[-1]


def test_a_box_with_cards_has_lines_that_add_up_and_the_options_that_place_the_model(
    real: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = "--gpu", "24GB*2", "--ram", "128GB", "--bandwidth", "80GB/s", "--types", "Q4_K_S", "--parallel", 2
    text = run(capfd, real, *options)
    lines = text.splitlines()
    assert lines[1] == "on 2 x 24 GiB, 128 GiB RAM, 32,768 tokens of context, 2 requests at a time"
    cards, ram, *parts, left = (float(line[1:].split()[0]) for line in lines[3:12])
    assert (cards, ram, lines[3][0], lines[4][0], lines[11][0]) == (46.0, 121.44, " ", "+", "=")
    assert cards + ram - sum(parts) == pytest.approx(left, abs=0.05)
    assert max(map(len, lines[1:])) <= 80
    report = json.loads(run(capfd, real, *options, "--json"))
    placed = report["rows"][0]["placed"]
    assert report["machine"]["devices"] == [23 * 2**30] * 2
    assert f" -np 2 --kv-unified \\\n    --n-cpu-moe {placed['placement']['n_cpu_moe']} --tensor-split " in text
    assert sum(placed["counts"]) == sum(placed["placement"]["tensor_split"]) == 49
    assert "What the cards read is not counted in it." in text


def test_a_box_without_a_bandwidth_has_no_speed(real: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = run(capfd, real, "--gpu", "96GB", "--ram", "64 GiB", "--types", "Q4_K_S")
    assert "tok/s is unknown" in text
    assert "--bandwidth gives a ceiling." in text


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            ["-m", "spark", "--gpu", "24GB", "--ram", "64GB"],
            "spark has its own memory and cards; leave out --machine, or",
        ),
        (["-m", "auto", "--ram", "64GB"], "auto has its own memory and cards; leave out --machine, or --ram"),
        (["--gpu", "24GB"], "--gpu without --ram: give the box's RAM, too"),
        (["--bandwidth", "90GB/s"], "--bandwidth without --ram: give the box's RAM, too"),
        (["--gpu", "24GBx2", "--ram", "64GB"], "'24GBx2' names no cards; write for example 24GB, or 24GB*2"),
        (["--gpu", "24GB*0", "--ram", "64GB"], "'24GB*0' names no cards"),
        (["--gpu", "*2", "--ram", "64GB"], "'*2' names no cards"),
        (["--gpu", "24", "--ram", "64GB"], "'24' is less than 1 GiB; write for example 24GB"),
        (["--gpu", "24GB", "--ram", "much"], "'much' is not a size"),
        (["--gpu", "24GB", "--ram", "64GB", "--bandwidth", "fast"], "'fast' is not a size"),
    ],
)
def test_a_box_that_is_described_wrongly_is_wrong_usage(
    options: list[str], text: str, small: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(small), *options]) == 2
    assert text in " ".join(capfd.readouterr().err.replace("│", " ").split())


@pytest.mark.parametrize(
    ("text", "gib"), [("24GB", [24]), ("24gib * 2", [24, 24]), ("1.5G", [1.5]), ("2048MB*3", [2, 2, 2])]
)
def test_memory_is_made_in_powers_of_two(text: str, gib: list[float]) -> None:
    assert list(Cards.parse(text)) == [n * 2**30 for n in gib]


@pytest.mark.slow
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


@pytest.mark.slow
def test_what_is_suggested_is_enough_without_an_imatrix_or_not_as_it_says(real: Path) -> None:
    recipe, _ = resolve_recipe(None, Limits(1), "")
    with Checkpoint(real) as checkpoint:
        enough, too_little = (Limits(parse_size(size)) for size in ("109.1GiB", "53.5GiB"))
        assert (
            plan_without_measuring(enough, checkpoint, Path("x.gguf"), Options(recipe)) is None
        )  # something is left to choose
        with pytest.raises(DoesNotFit):
            plan_without_measuring(too_little, checkpoint, Path("x.gguf"), Options(recipe))


@pytest.mark.slow
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


@pytest.mark.slow
def test_measured_rows_have_a_loss_and_rows_of_fit_lose_least(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(folders, "measurements", lambda: tmp_path)
    monkeypatch.setattr(measure, "MEASURED_TYPES", [T.Q2_K, T.Q4_K, T.Q8_0])
    options = ["-m", "spark", "--ctx", 1024, "--measure", "--threads", 1]
    report = json.loads(run(capfd, small, *options, "--types", "Q8_0,Q6_K", "--json"))
    found = {row["type"]: row for row in report["rows"]}
    fit = [row for name, row in found.items() if name.startswith("fit ")]
    assert len(fit) == planning.N_BUDGET_ROWS
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


@pytest.mark.parametrize("mtp", [True, False])
def test_what_is_suggested_for_a_gguf_has_only_options_that_there_are(mtp: bool, demo_gguf: Path) -> None:
    with open_source(demo_gguf) as source:
        result = plan_for_machine(source, target_machine("spark"), ContextParams(1024, mtp=mtp), ["Q8_0"])
    commands = {row.type: next_command(demo_gguf, result, row) for row in result.rows}
    keeps = "" if mtp else "  # keeps the MTP blocks, which this plan leaves out"
    assert commands["Q8_0"] == f"stepgguf quantize {demo_gguf} models/ --type Q8_0{keeps}"
    draft = "" if mtp else " --draft 0"
    assert commands[planning.OWN_TYPES] == f"stepgguf chat {demo_gguf} --ctx 1024{draft}"


@pytest.mark.parametrize(
    ("target", "command"),
    [
        (target_machine("spark-2"), "serve --engine llama-server --rpc HOST:50052"),
        (target_machine("cuda-24-64"), "chat"),
        (described_box((GIB + 26 * MIB,), 8 * GIB, None), "chat"),
    ],
    ids=["machines", "card", "small card"],
)
def test_a_gguf_is_run_where_it_is_placed(target: TargetMachine, command: str, demo_gguf: Path) -> None:
    with open_source(demo_gguf) as source:
        result = plan_for_machine(source, target, ContextParams(512), ["Q8_0"])
    own = next(row for row in result.rows if row.type == planning.OWN_TYPES)
    assert own.fits
    assert next_command(demo_gguf, result, own) == f"stepgguf {command} {demo_gguf} --ctx 512"


def test_a_checkpoint_is_converted_without_its_mtp_blocks(small: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(small), "--ctx", "1024", "--types", "Q8_0", "--mtp", "drop"]) == 0
    assert f"next: stepgguf convert {small} models/ --type Q8_0 --mtp drop\n" in capfd.readouterr().err


def test_an_imatrix_is_for_measuring(small: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(small), "--imatrix", str(small / "config.json")]) == 2
    assert "an importance matrix counts only with --measure" in capfd.readouterr().err


def test_a_context_beyond_the_trained_one_is_a_warning(small: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(small), "--types", "Q8_0", "--ctx", "5000"]) == 0
    assert "5,000 tokens are more than the 4,096 that the model was trained for" in capfd.readouterr().err


@pytest.mark.slow
def test_a_machine_that_is_too_small_says_so(real: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert "None of these fits." in run(capfd, real, "-m", "mac-64", "--types", "Q8_0")


def test_an_unknown_machine_gets_the_nearest_and_the_list(real: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(real), "--machine", "Spark1"]) == 2
    text = " ".join(capfd.readouterr().err.replace("│", " ").split())
    assert (
        "'Spark1' is not in the list of machines. Did you mean spark? Choose one of: auto, spark, spark-2, strix-128,"
        in text
    )


@pytest.mark.slow
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


@pytest.mark.slow
def test_it_is_quick(real: Path) -> None:
    """Processor time, as this machine may be busy: all rows of the real model."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "stepgguf", "plan", str(real), "-m", "spark", "--ctx", str(CTX)]
    subprocess.run(command, capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2.0
