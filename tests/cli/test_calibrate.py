"""convert and quantize with --calibrate: interrupted, refused, split, and read by others."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from stepgguf import __main__
from stepgguf.calibration.conversion import CalibratedUnits
from stepgguf.cli import calibrating
from stepgguf.cli.main import main
from stepgguf.convert import writer
from stepgguf.convert.sources.full_hparams import full_hparams
from stepgguf.convert.sources.opening import open_source
from stepgguf.files import disk, gguf_header
from stepgguf.model.layers import Layer
from stepgguf.reference.model import DecoderLayer
from stepgguf.reference.stream import LayerStream
from stepgguf.reference.token_rows import TokenRows
from stepgguf.reference.weights import WeightReader
from tests.calibration import passes
from tests.calibration.test_conversion import tensor_bytes
from tests.conftest import INTERRUPTIBLE
from tests.reference.test_logits import llama_logits

pytestmark = pytest.mark.slow

ROW = 64
OPTIONS = ("-t", "Q4_K_S", "--name", "x", "--threads", "1", "-q")
FIT = ("--target-bpw", "4.6", "--name", "x", "--threads", "1", "-q")
# A process that kills itself when a function is called for the n-th time.
KILLED = f"""
import os, shutil, signal, sys
from stepgguf.calibration.conversion import CalibratedUnits
from stepgguf.cli import calibrating
from stepgguf.cli.main import main
from stepgguf.convert import manifest, pipeline
from stepgguf.reference.backward import BackwardStream
from stepgguf.reference.state_folder import StateFolder
from stepgguf.reference.stream import LayerStream
calibrating.ROW_TOKENS = {ROW}

def kill_at(owner, name, n, after=False):
    function, calls = getattr(owner, name), []
    def call(*args, **options):
        calls.append(0)
        if len(calls) == n and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*args, **options)
        if len(calls) == n:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(owner, name, call)

kill_at(POINT)
sys.exit(main(sys.argv[1:]))
"""
POINTS = {
    "in the exact pass": "LayerStream, '_run_layer', 2",
    "in the gradients": "BackwardStream, '_run_layer', 2",
    "in the codes of a layer": "CalibratedUnits, 'write', 14",
    "between a layer's commit and its states": "CalibratedUnits, 'commit', 2, after=True",
    "between a layer's states and their removal": "StateFolder, 'drop_states', 7",
    "before the rest of the file": "pipeline, 'make_units', 1",
    "between the manifest and the final name": "manifest, 'write_manifest', 1, after=True",
    "while the working files are removed": "shutil, 'rmtree', 1",
}


@pytest.fixture(autouse=True)
def _short_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrating, "ROW_TOKENS", ROW)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return passes.checkpoint(tmp_path_factory.mktemp("source"))


def write_text(path: Path, seed: int = 0, n_words: int = 150) -> Path:
    rng = np.random.default_rng(seed)
    words = ["".join(rng.choice(list("etaoinshrdlu"), rng.integers(2, 7))) for _ in range(n_words)]
    path.write_text(" ".join(words))
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


def command(checkpoint: Path, dest: Path, text: Path, *options: str) -> list[str]:
    return ["convert", str(checkpoint), str(dest), "--calibrate", str(text), *(options or OPTIONS)]


@pytest.fixture(scope="module")
def whole(checkpoint: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that was made without an interruption."""
    dest = tmp_path_factory.mktemp("whole") / "out.gguf"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrating, "ROW_TOKENS", ROW)
        assert main(command(checkpoint, dest, text)) == 0
    return dest


def killed(point: str, arguments: list[str]) -> None:
    code = KILLED.replace("POINT", point)
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == -signal.SIGKILL, result.stderr


def test_only_the_file_and_its_manifest_are_left(whole: Path) -> None:
    assert sorted(path.name for path in whole.parent.iterdir()) == ["out.gguf", "out.gguf.manifest.json"]


@pytest.mark.parametrize("point", POINTS.values(), ids=POINTS)
def test_killed_and_repeated_it_makes_the_same_bytes(
    point: str, checkpoint: Path, text: Path, tmp_path: Path, whole: Path
) -> None:
    dest = tmp_path / "out.gguf"
    killed(point, command(checkpoint, dest, text))
    assert (tmp_path / "out.gguf.journal").exists()
    assert main(command(checkpoint, dest, text)) == 0
    assert dest.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.gguf", "out.gguf.manifest.json"]


def interrupt(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    """Leave a run after its second layer."""
    commit, calls = CalibratedUnits.commit, list[int]()

    def call(units: CalibratedUnits) -> None:
        commit(units)
        calls.append(0)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(CalibratedUnits, "commit", call)
        assert main(arguments) == 130


def test_ctrl_c_says_how_to_go_on(
    checkpoint: Path, text: Path, tmp_path: Path, whole: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    dest = tmp_path / "out.gguf"
    code = INTERRUPTIBLE[2].replace("run()", f"from stepgguf.cli import calibrating as c; c.ROW_TOKENS = {ROW}; run()")
    process = subprocess.Popen([*INTERRUPTIBLE[:2], code, *command(checkpoint, dest, text)])
    while not list(tmp_path.glob("out.gguf.calibration/states/quantized/states-001")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert "keeps the layers that are done: repeat the command to go on" in " ".join(capfd.readouterr().err.split())
    assert not dest.exists()
    assert main(command(checkpoint, dest, text)) == 0
    assert dest.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    "options", [("--calibrate-tokens", "200"), (), FIT], ids=["fewer tokens", "text", "with types"]
)
def test_other_text_does_not_go_on_with_a_run(
    options: tuple[str, ...],
    checkpoint: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    dest = tmp_path / "out.gguf"
    interrupt(monkeypatch, command(checkpoint, dest, text, *(options if options == FIT else OPTIONS)))
    other = text if "--calibrate-tokens" in options else write_text(tmp_path / "other.txt", seed=1)
    again = command(checkpoint, dest, other, *(options if options == FIT else (*OPTIONS, *options)))
    assert main(again) != 0
    said = " ".join(capsys.readouterr().err.split())
    assert "is of an interrupted run with another calibration:" in said
    assert "--restart" in said
    assert (tmp_path / "out.gguf.calibration" / "states" / "quantized").is_dir()
    monkeypatch.setattr(LayerStream, "run_trunk", assert_empty(LayerStream.run_trunk))
    assert main([*again, "--restart"]) == 0
    assert not (tmp_path / "out.gguf.calibration").exists()


def assert_empty(run: Callable[[LayerStream], None]) -> Callable[[LayerStream], None]:
    """A stream's run that finds nothing of an earlier one."""

    def checked(stream: LayerStream) -> None:
        assert stream.folder.last_states() == -1
        run(stream)

    return checked


def test_a_run_without_calibration_takes_the_folder_away(
    checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dest = tmp_path / "out.gguf"
    interrupt(monkeypatch, command(checkpoint, dest, text))
    assert main(["convert", str(checkpoint), str(dest), *OPTIONS]) != 0
    assert main(["convert", str(checkpoint), str(dest), *OPTIONS, "--restart"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.gguf", "out.gguf.manifest.json"]


def test_a_second_process_is_refused(
    checkpoint: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held = disk.hold(tmp_path / "out.gguf.journal", make=True)
    assert main(command(checkpoint, tmp_path / "out.gguf", text)) != 0
    assert "is in use: another stepgguf is writing it" in " ".join(capsys.readouterr().err.split())
    os.close(held)


def test_a_disk_without_room_for_the_working_files_is_named_before_anything_is_written(
    checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = writer.shutil.disk_usage(tmp_path)._replace(free=5 * 2**20)  # the file has 3.6 MiB
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: usage)
    assert main(command(checkpoint, tmp_path / "out.gguf", text)) != 0
    said = " ".join(capsys.readouterr().err.split())
    assert "has 5.00 MiB free, the output needs" in said
    assert "of it for working files" in said
    assert "--calibrate-tokens" in said
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_runs_nothing_and_writes_nothing(
    checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delattr(LayerStream, "run_trunk")
    arguments = [option for option in command(checkpoint, tmp_path / "out.gguf", text) if option != "-q"]
    assert main([*arguments, "--dry-run"]) == 0
    assert "calibration: 576 tokens of text.txt" in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_says_what_each_pass_takes(
    checkpoint: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command(checkpoint, tmp_path / "out.gguf", text), "--dry-run", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)["calibration"]
    assert list(report["passes"]) == ["exact model", "gradients", "codes"]
    assert list(report["passes"]["codes"]) == ["streams", "moments", "factors", "targets", "search"]
    assert all(part["flop"] > 0 for parts in report["passes"].values() for part in parts.values())
    stored = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    assert 0 < report["read_bytes"] <= 3 * stored
    assert report["memory_bytes"] > report["disk_bytes"] > 0


@pytest.mark.parametrize(
    "options",
    [("--split-max-size", "1M"), ("--mtp", "separate"), ("--mtp", "drop"), ("--kernel", "ggml")],
    ids=lambda options: " ".join(options),
)
def test_files_of_another_form_have_the_same_codes(
    options: tuple[str, ...], checkpoint: Path, text: Path, tmp_path: Path, whole: Path
) -> None:
    assert main(command(checkpoint, tmp_path / "out.gguf", text, *OPTIONS, *options)) == 0
    expected, found = tensor_bytes(whole), dict[str, NDArray[np.uint8]]()
    for path in sorted(tmp_path.glob("*.gguf"), reverse=True):  # mtp-out.gguf has a head of its own
        found = tensor_bytes(path) | found
        assert main(["verify", str(path), "-q"]) == 0
    for name, data in expected.items():
        if name in found or options != ("--mtp", "drop"):
            np.testing.assert_array_equal(found[name], data, err_msg=name)
    assert not list(tmp_path.glob("*.calibration"))


def test_quantize_makes_nearly_the_same_codes_of_a_gguf(
    checkpoint: Path, text: Path, tmp_path: Path, whole: Path
) -> None:
    """A GGUF has norms + 1 and RoPE's factors in float32: states differ in the last bits, and a few codes with them."""
    source, dest = tmp_path / "bf16.gguf", tmp_path / "out.gguf"
    assert main(["convert", str(checkpoint), str(source), "-t", "BF16", "--mtp-type", "Q8_0", "-q"]) == 0
    arguments = ["quantize", str(source), str(dest), "--calibrate", str(text), "-t", "Q4_K_S", "--threads", "1", "-q"]
    assert main([*arguments, "--allow-requantize"]) == 0
    expected, found = tensor_bytes(whole), tensor_bytes(dest)
    differ = np.concatenate([found[name] != data for name, data in expected.items()]).mean()
    assert differ < 0.02


@pytest.mark.parametrize("with_matrix", [True, False])
def test_types_that_need_importance_take_a_matrix_or_what_calibration_finds(
    checkpoint: Path, text: Path, tmp_path: Path, with_matrix: bool
) -> None:
    matrix, dest, options = tmp_path / "imatrix.gguf", tmp_path / "out.gguf", ["-t", "IQ2_XS", "-q"]
    if with_matrix:
        assert main(["imatrix", str(checkpoint), str(text), "-o", str(matrix), "--chunk", "64", "-q"]) == 0
        options += ["--imatrix", str(matrix)]
    assert main(command(checkpoint, dest, text, *options)) == 0
    assert main(["verify", str(dest), "-q"]) == 0


def test_manifest_verify_and_report_know_the_file(
    whole: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(whole), "-q"]) == 0
    assert main(["verify", str(whole), "--against", str(checkpoint)]) != 0
    assert "the codes are calibrated on" in " ".join(capsys.readouterr().err.split())
    manifest = json.loads(Path(f"{whole}.manifest.json").read_text())
    assert manifest["tensors"]["blk.1.ffn_up_exps.weight"]["type"] == "Q4_K"
    assert main(["report", str(whole), "-o", str(tmp_path / "page.html"), "-q"]) == 0


def test_llama_cpp_computes_what_the_streams_do(whole: Path, tmp_path: Path) -> None:
    text = passes.rows(2).tokens[0]
    theirs = llama_logits(whole, text.tolist())
    with open_source(whole) as source:
        reader = WeightReader(source, full_hparams(source).without_mtp(), torch.device("cpu"))
        stream = LayerStream(reader, TokenRows.of(text[None]), tmp_path / "stream")
        stream.run_trunk()
        ours = torch.cat([part for _, part in stream.logits()])[0]
    # llama.cpp rounds what enters a product to 8 bits: 0.09 of the norm on stock codes of this model, 0.06 on these.
    assert (theirs - ours).norm() < 0.15 * ours.norm()


def test_a_damaged_weight_is_said_before_gradients_are_computed(
    checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    layer = WeightReader.layer

    def damaged(reader: WeightReader, spec: Layer) -> DecoderLayer:
        module = layer(reader, spec)
        module.self_attn.o_proj.weight[3, 4] = torch.nan
        return module

    monkeypatch.setattr(WeightReader, "layer", damaged)
    assert main(command(checkpoint, tmp_path / "out.gguf", text)) != 0
    assert "hidden states are not finite" in " ".join(capsys.readouterr().err.split())


def test_a_number_of_tokens_needs_a_text(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [*OPTIONS, "--calibrate-tokens", "100"]
    assert main(["convert", str(checkpoint), str(tmp_path / "out.gguf"), *options]) == 2
    assert "it needs --calibrate" in " ".join(capsys.readouterr().err.split())


def test_costs_are_kept_for_other_sizes(
    checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    costs, first = tmp_path / "model.costs", tmp_path / "first.gguf"
    assert main(command(checkpoint, first, text, *FIT, "--costs", str(costs))) == 0
    monkeypatch.setattr("stepgguf.convert.measure.measure_errors", None)
    monkeypatch.setattr(LayerStream, "run_trunk", None)
    types: list[list[str]] = []
    predicted: list[float] = []
    for bpw in ("4.6", "6"):
        dest = tmp_path / f"{bpw}.gguf"
        options = ("--target-bpw", bpw, "--name", "x", "--costs", str(costs))
        capsys.readouterr()
        assert main(["convert", str(checkpoint), str(dest), *options, "--json"]) == 0
        predicted.append(json.loads(capsys.readouterr().out)["predicted_kld"])
        header = gguf_header.read(dest)
        types.append([tensor.ggml_type.name for tensor in header.tensors])
        assert header.get("stepgguf.predicted_kld") == pytest.approx(predicted[-1])
    assert types[0] == [tensor.ggml_type.name for tensor in gguf_header.read(first).tensors]
    assert 0 < predicted[1] < predicted[0]
    assert gguf_header.read(first).get("stepgguf.predicted_kld") == pytest.approx(predicted[0])


def test_costs_that_are_not_there_are_named(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["convert", str(checkpoint), str(tmp_path / "out.gguf"), "--costs", str(tmp_path / "none")]
    assert main([*arguments, *FIT]) == 1
    assert "none: No such file" in " ".join(capsys.readouterr().err.split())
    assert main([*arguments, *OPTIONS]) == 2
    assert "it needs a budget" in " ".join(capsys.readouterr().err.split())


def test_numpy_s_products_get_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """On two busy cores, OpenBLAS's two threads take three to seven times as long as one: they wait by spinning."""
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr("stepgguf.cli.main.run", lambda: None)
    __main__.run()
    assert os.environ == {"OPENBLAS_NUM_THREADS": "1", "VECLIB_MAXIMUM_THREADS": "1"}
