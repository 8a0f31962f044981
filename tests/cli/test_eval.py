"""stepgguf eval as a user meets it."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stepgguf.cli.main import main
from stepgguf.cli.stream_progress import StreamMeter
from stepgguf.convert.cost_file import write_costs
from stepgguf.convert.measure import possible_types
from stepgguf.convert.sizes import take_inventory
from stepgguf.convert.sources.checkpoint import Checkpoint
from stepgguf.demo import CHECKPOINT
from stepgguf.demo.tasks import HELD_OUT, ask_weather, count_letters
from stepgguf.files import gguf_header
from stepgguf.fit.machine import probe_machine
from stepgguf.quants.types import bits_per_weight
from stepgguf.reference.stream import LayerProgress
from tests.generate import Shape, write_checkpoint

pytestmark = pytest.mark.slow
OPTIONS = ["--threads", "1", "-q", "--ctx", "64", "--chunks", "4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model as F32 and Q4_K, a text, chats, and what F32 says of the text: all that the tests read."""
    folder = tmp_path_factory.mktemp("eval")
    for name, type_name in (("f32.gguf", "F32"), ("q4.gguf", "Q4_K_S")):
        assert main(["convert", str(CHECKPOINT), str(folder / name), "-t", type_name, "-q"]) == 0
    (folder / "text.txt").write_text("".join(f"How many letters are there in the word {w}? " for w in HELD_OUT))
    with_tools, tools = ask_weather(random.Random(0), "Zurich")
    chats = [{"messages": with_tools, "tools": tools}, {"messages": count_letters("banana", "a")}]
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    assert run(folder, "f32.gguf", "--against", "f32.gguf", "--base", "f32.base", "--json") == 0
    return folder


def run(folder: Path, file: str, *options: str, text: str | None = "text.txt") -> int:
    """Run eval; what has a suffix is a file of the folder."""
    placed = [str(folder / option) if Path(option).suffix else option for option in options]
    texts = [] if text is None else ["--text", str(folder / text)]
    return main(["eval", str(folder / file), *placed, *texts, *OPTIONS])


def result(capfd: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capfd.readouterr().out)
    return found


def test_a_file_against_a_checkpoint_with_dialogues(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = ["--against", str(CHECKPOINT), "--text", str(folder / "chats.jsonl"), "--json"]
    capfd.readouterr()
    assert run(folder, "q4.gguf", *options, "--base", "checkpoint.base") == 0
    assert not list(folder.glob("*.stream"))
    found = result(capfd)
    assert [c["name"] for c in found["columns"]] == ["text, context 64", "random tokens", "dialogues"]
    assert [c["predictions"] for c in found["columns"][:2]] == [4 * 31, 4 * 31]
    assert all(0.0005 < c["kld"]["value"] < 0.3 for c in found["columns"])
    assert found["bytes"] < 0.2 * (folder / "f32.gguf").stat().st_size


def test_a_kept_reference_says_the_same_as_the_original(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    assert run(folder, "q4.gguf", "--against", "f32.gguf", "--json") == 0
    first = result(capfd)
    assert run(folder, "q4.gguf", "--against", "f32.base", "--json", text=None) == 0
    second = result(capfd)
    assert first.pop("against") != second.pop("against")
    assert first == second


def test_an_identical_file_scores_zero_against_a_small_reference(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    capfd.readouterr()
    assert run(folder, "f32.gguf", "--against", "f32.gguf", "--top-k", "5", "--json") == 0
    found = result(capfd)
    assert found["top_k"] == 5
    assert {(c["kld"]["value"], c["kld_max"], c["kld_min"]) for c in found["columns"]} == {(0.0, 0.0, 0.0)}


def test_a_file_runs_by_streaming_where_activations_are_exact(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Its own stream is no different; what llama.cpp's 8-bit activations add is seen."""
    capfd.readouterr()
    found = {}
    for against, engine in (("q4.gguf", "stream"), ("q4.base", "stream"), ("q4.base", "llama-cpp-python")):
        options = ["--base", "q4.base", "--top-k", "768"] if against == "q4.gguf" else []
        assert run(folder, "q4.gguf", "--against", against, *options, "--engine", engine, "--json") == 0
        found[against, engine] = result(capfd)
        assert found[against, engine]["engine"] == engine
    klds = {key: [column["kld"]["value"] for column in value["columns"]] for key, value in found.items()}
    assert klds["q4.gguf", "stream"] == klds["q4.base", "stream"] == [0.0, 0.0]
    assert all(1e-5 < kld < 0.1 for kld in klds["q4.base", "llama-cpp-python"])


def test_an_original_that_does_not_fit_is_streamed(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = probe_machine()
    seen = iter([replace(machine, ram=1, ram_available=1), machine])  # for the original, and for the file
    monkeypatch.setattr("stepgguf.fit.machine.probe_machine", lambda: next(seen))
    capfd.readouterr()
    paths = [str(folder / "q4.gguf"), "--against", str(folder / "f32.gguf"), "--text", str(folder / "text.txt")]
    assert main(["eval", *paths, *(option for option in OPTIONS if option != "-q")]) == 0
    err = capfd.readouterr().err
    assert "so it is streamed, layer by layer" in err
    assert "layers, each read once; about" in err
    monkeypatch.setattr("stepgguf.fit.machine.probe_machine", lambda: replace(machine, ram=1, ram_available=1))
    assert "Or let it be streamed: --engine stream" in refused(folder, capfd, "--against", "f32.base", text=None)


def test_the_table_is_on_stdout_and_the_result_in_its_file(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    assert run(folder, "q4.gguf", "--against", "f32.base", "-o", "table.json", text=None) == 0
    out, err = capfd.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert [name.strip() for name in lines[2].split("  ") if name.strip()] == ["text, context 64", "random tokens"]
    written = json.loads((folder / "table.json").read_text())["columns"][0]
    [kld] = [line for line in lines if line.startswith("KL divergence")]
    assert f"{written['kld']['value']:.6f} ± {written['kld']['error']:.6f}" in kld
    assert run(folder, "q4.gguf", "--against", "f32.base", "-o", "table.json", text=None) == 1
    assert "table.json exists\nhint: " in capfd.readouterr().err


def test_types_that_were_chosen_are_no_stock_mixture(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (folder / "own.toml").write_text('default = "Q4_K"\n')
    assert main(["convert", str(CHECKPOINT), str(folder / "own.gguf"), "-t", str(folder / "own.toml"), "-q"]) == 0
    for name, is_stock in (("own.gguf", False), ("q4.gguf", True)):
        capfd.readouterr()
        assert run(folder, name, "--against", "f32.base", "--json", text=None) == 0
        assert result(capfd)["is_stock"] is is_stock


def test_what_was_predicted_stands_beside_what_is_measured(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    costs, dest = folder / "model.costs", folder / "fit.gguf"
    with Checkpoint(CHECKPOINT) as source:
        matrices = take_inventory(source).matrices
        made_up = {
            m.name: {g: 2.0 ** -bits_per_weight(g) for g in possible_types(m.name, m.shape, None)} for m in matrices
        }
        write_costs(costs, made_up, source, None)
    options = ("--target-bpw", "5", "--costs", str(costs), "--mtp", "drop", "-q")
    assert main(["convert", str(CHECKPOINT), str(dest), *options]) == 0
    predicted = gguf_header.read(dest).get("stepgguf.predicted_kld")
    assert 0.1 < predicted < len(made_up)
    capfd.readouterr()
    assert run(folder, "fit.gguf", "--against", "f32.base", text=None) == 0
    said = (
        f"KL divergence predicted when the types were chosen, for stock codes on the calibration text: {predicted:.6f}."
    )
    assert said in capfd.readouterr().out.splitlines()


def test_the_frontier_of_several_results_is_in_the_report(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("q4", "f32"):
        assert run(folder, f"{name}.gguf", "--against", "f32.base", "-o", f"{name}.json", text=None) == 0
    results = ["--eval", str(folder / "q4.json"), "--eval", str(folder / "f32.json")]
    assert main(["report", str(folder / "q4.gguf"), *results, "-o", str(folder / "page.html"), "-q"]) == 0
    page = (folder / "page.html").read_text()
    assert '"frontier":{"columns":["text, context 64","random tokens"],"off":1,"top_k":0' in page


def test_dialogues_alone_have_random_tokens_beside_them(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for against, more in (("f32.gguf", ["--base", str(folder / "chats.base"), "--ctx", "64"]), ("chats.base", [])):
        capfd.readouterr()
        paths = [str(folder / "q4.gguf"), "--against", str(folder / against), "--text", str(folder / "chats.jsonl")]
        assert main(["eval", *paths, *more, "--json", "-q", "--threads", "1"]) == 0
        columns = result(capfd)["columns"]
        assert [column["name"] for column in columns] == ["random tokens", "dialogues"]
        assert ["errors_by_row" in column for column in columns] == [False, True]
        assert 0 < columns[1]["errors_by_row"]["kld"] < 0.1


def refused(folder: Path, capfd: pytest.CaptureFixture[str], *options: str, text: str | None = "text.txt") -> str:
    """What is said of a wrong command: two lines, and no traceback."""
    capfd.readouterr()
    assert run(folder, "q4.gguf", *options, text=text) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.splitlines()[-1].startswith("hint: ")
    return err


def test_a_reference_of_another_text_is_refused(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (folder / "other.txt").write_text("Good morning! " + (folder / "text.txt").read_text())
    said = refused(folder, capfd, "--against", "f32.base", text="other.txt")
    assert "f32.base: text, context 64: token 1 of row 0 is" in said
    assert "another text or of another tokenizer" in said


def test_a_reference_of_another_context_is_refused(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    said = refused(folder, capfd, "--against", "f32.base", "--ctx", "128")
    assert "f32.base: has no text of context 128, but of 64" in said


def test_of_a_reference_with_several_contexts_one_is_enough(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(folder, "f32.gguf", "--against", "f32.gguf", "--base", "two.base", "--ctx", "160") == 0
    capfd.readouterr()
    assert run(folder, "q4.gguf", "--against", "two.base", "--json") == 0
    columns = result(capfd)["columns"]  # random tokens are read in the first context
    assert [(c["name"], c["context"]) for c in columns] == [("text, context 64", 64), ("random tokens", 160)]


def test_a_truncated_reference_is_refused(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (folder / "cut.base").write_bytes((folder / "f32.base").read_bytes()[:-1])
    assert "cut.base: truncated" in refused(folder, capfd, "--against", "cut.base", text=None)


def test_a_reference_of_another_vocabulary_is_refused(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = write_checkpoint(tmp_path / "other", Shape(vocab=1024))
    said = refused(folder, capfd, "--against", str(other), "--base", "never.base")
    assert "a vocabulary of 1,024 tokens, and the evaluated file has 768" in said
    assert not (folder / "never.base").exists()


def test_too_little_text_and_what_is_no_text_are_refused(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert "context of 4,096 needs at least 8,192" in refused(folder, capfd, "--against", "f32.gguf", "--ctx", "4096")
    (folder / "bad.jsonl").write_text('{"messages": 3}\n')
    said = refused(folder, capfd, "--against", "f32.gguf", text="bad.jsonl")
    assert "bad.jsonl: line 1: messages is 3, expected a list" in said
    assert "No such file" in refused(folder, capfd, "--against", "f32.gguf", text="nowhere.txt")


def test_a_place_that_cannot_be_written_is_refused_before_anything_runs(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for option in ("--base", "-o"):
        place = str(folder / "nowhere" / "x.json")
        assert "nowhere: no such folder" in refused(folder, capfd, "--against", "f32.gguf", option, place)


def test_what_is_interrupted_goes_on_to_the_same_bytes(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options, base = ["--against", str(CHECKPOINT), "--base"], tmp_path / "a.base"
    assert run(folder, "q4.gguf", *options, str(tmp_path / "whole.base")) == 0

    def interrupt(meter: StreamMeter, at: LayerProgress) -> None:
        meter.share = at.done / at.total
        if at.layer == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(StreamMeter, "show", interrupt)
        capfd.readouterr()
        assert run(folder, "q4.gguf", *options, str(base)) == 130
        assert "a.base.stream keeps the layers that are done: repeat the command" in capfd.readouterr().err
        assert run(folder, "q4.gguf", "--against", str(CHECKPOINT)) == 130
        assert "with --base FILE for the original" in capfd.readouterr().err
    assert [path.name for path in (tmp_path / "a.base.stream" / "states").glob("states-*")] == ["states-002"]
    seen = list[int | None]()
    show = StreamMeter.show
    monkeypatch.setattr(StreamMeter, "show", lambda meter, at: (seen.append(at.earlier), show(meter, at)))
    assert run(folder, "q4.gguf", *options, str(base)) == 0
    assert seen[-1]  # layers that are done are not run again
    assert base.read_bytes() == (tmp_path / "whole.base").read_bytes()
    assert not (tmp_path / "a.base.stream").exists()


def test_a_reference_that_does_not_fit_the_disk_is_refused_first(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """248 predictions of 768 codes; the working files of a stream are asked for as well."""
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=350_000))
    said = refused(folder, capfd, "--against", "f32.gguf")
    assert "the reference would take 373.9 KiB, and 341.8 KiB are free" in said  # 8 + 2 * 768 bytes each
    said = refused(folder, capfd, "--against", str(CHECKPOINT), "--top-k", "8")
    assert "341.8 KiB free, and working files take up to" in said


def test_wrong_usage_has_exit_code_2(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(folder, "q4.gguf", "--against", "f32.base", "--top-k", "3") == 2
    assert "--against is a BASE already" in capfd.readouterr().err
