"""stepgguf imatrix as a user meets it; its numbers against those of llama.cpp's own tool.

tests/data/recorded-imatrix.bin was made by llama-imatrix (llama.cpp of llama-cpp-python 0.3.36) of the embedded model,
converted to F32, and cut to seven of its tensors:

    llama-imatrix -m F32.gguf -f recorded-imatrix.txt -c 512 -b 512 --process-output --no-ppl -ctk f32 -ctv f32 -fa off
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader

from stepgguf.calibration import imatrix as calibration
from stepgguf.cli.main import main
from stepgguf.cli.stream_progress import StreamMeter
from stepgguf.demo import CHECKPOINT
from stepgguf.files import installed
from stepgguf.quants.imatrix import read_imatrix
from stepgguf.reference.stream import LayerProgress
from tests.cli.test_cli import without
from tests.conftest import DATA
from tests.convert.test_bytes import same_tensors
from tests.oracle import llama_quantize

pytestmark = pytest.mark.slow

TEXT = DATA / "recorded-imatrix.txt"
# Of each sum. Two float32 forward passes, and the tool adds float32: at most 1.5e-5 measured here, 5.6e-5 on 36 chunks.
LIMIT = 2e-4


def command(source: Path, path: Path, *options: str) -> list[str]:
    return ["imatrix", str(source), str(TEXT), "-o", str(path), "--threads", "1", *options]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The matrix of the embedded model's checkpoint. Read-only."""
    path = tmp_path_factory.mktemp("made") / "imatrix.gguf"
    assert main(command(CHECKPOINT, path, "-q")) == 0
    return path


def test_sums_and_counts_are_those_of_llama_imatrix(made: Path) -> None:
    theirs, ours = read_imatrix(DATA / "recorded-imatrix.bin"), read_imatrix(made)
    assert (ours.chunk_count, ours.chunk_size) == (theirs.chunk_count, theirs.chunk_size) == (2, 512)
    assert ours.datasets == (TEXT.name,)
    assert len(theirs.entries) == 7
    for name, entry in theirs.entries.items():
        assert np.array_equal(ours.entries[name].counts, entry.counts), name
        np.testing.assert_allclose(ours.entries[name].sums, entry.sums, rtol=LIMIT, err_msg=name)


def test_it_says_what_it_takes_and_what_each_expert_saw(made: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(command(CHECKPOINT, made.with_name("other.gguf"))) == 0
    out, err = capfd.readouterr()
    assert out == ""
    assert "1,024 tokens of 1 text in 2 chunks of 512, through 5 layers and 3 MTP blocks" in err
    assert "of working files in " in err
    assert "80 tensors from 2 chunks" in err
    counts = read_imatrix(made).entries["blk.2.ffn_gate_exps.weight"].counts  # 199 541 617 177 174 340
    assert [line.split() for line in err.splitlines() if line.startswith("    2 ")] == [
        ["2", "6", "0", "3", f"{counts.min():.0f}", f"{np.median(counts):.0f}"]
    ]
    assert "saw fewer than 256 tokens" in err
    assert made.with_name("other.gguf").read_bytes() == made.read_bytes()
    assert sorted(path.name for path in made.parent.iterdir()) == ["imatrix.gguf", "other.gguf"]


def test_the_report_as_json(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(command(CHECKPOINT, tmp_path / "x.gguf", "--json", "--chunks", "1", "--balance", "100")) == 0
    report: dict[str, Any] = json.loads(capfd.readouterr().out)
    assert (report["tokens"], report["chunks"], report["chunks_run"], report["tensors"]) == (512, 1, 1, 80)
    assert [layer["layer"] for layer in report["layers"]] == [2, 3, 4]
    counts = read_imatrix(tmp_path / "x.gguf").entries
    for below in report["below_balance"]:
        name = f"blk.{below['layer']}.ffn_up_exps.weight"
        assert counts[name].counts[below["expert"]] == below["tokens"] < 100
    assert report["below_balance"]
    assert report["bytes"] == (tmp_path / "x.gguf").stat().st_size


def test_a_dry_run_writes_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(command(CHECKPOINT, tmp_path / "absent" / "x.gguf", "--dry-run", "--json")) == 0
    report = json.loads(capfd.readouterr().out)
    assert report["disk_bytes"] > 3 * 1024 * 256 * 4  # three states
    assert report["flop"] > 0
    assert report["predicted_seconds"] >= 0
    assert list(tmp_path.iterdir()) == []


def test_a_taken_name_is_refused_before_anything_runs(made: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = made.read_bytes()
    assert main(command(CHECKPOINT, made)) == 1
    assert "imatrix.gguf" in capfd.readouterr().err
    assert made.read_bytes() == before


def test_the_embedded_models_quantized_file_is_a_source_too(made: Path, demo_gguf: Path, tmp_path: Path) -> None:
    """BF16 here, in which the FP8 experts lose nothing that matters."""
    assert main(command(demo_gguf, tmp_path / "x.gguf", "-q")) == 0
    ours, theirs = read_imatrix(tmp_path / "x.gguf"), read_imatrix(made)
    assert ours.entries.keys() == theirs.entries.keys()
    entry, expected = (m.entries["blk.3.attn_output.weight"] for m in (ours, theirs))
    assert np.abs(entry.sums - expected.sums).mean() < 0.01 * expected.sums.mean()


def test_llama_quantize_and_ours_make_the_same_bytes_with_it(tmp_path: Path) -> None:
    """The file is read by gguf's own reader here, and divided as llama-quantize divides it."""
    source, matrix = tmp_path / "f32.gguf", tmp_path / "imatrix.gguf"
    assert main(["convert", str(CHECKPOINT), str(source), "-t", "F32", "--mtp", "drop", "-q"]) == 0
    assert main(command(source, matrix, "-q")) == 0
    tensors = {tensor.name: np.array(tensor.data) for tensor in GGUFReader(matrix).tensors}
    rows = {}
    for name in [name.removesuffix(".counts") for name in tensors if name.endswith(".counts")]:
        counts = tensors[f"{name}.counts"].reshape(-1, 1)
        sums = tensors[f"{name}.in_sum2"].reshape(len(counts), -1)
        assert tensors[f"{name}.in_sum"].size == sums.size
        rows[name] = np.ascontiguousarray(sums / counts)
    llama_quantize(source, tmp_path / "theirs.gguf", "Q4_K_M", imatrix=rows)
    options = ["--imatrix", str(matrix), "--imatrix-prior", "flat", "-q"]
    assert main(["quantize", str(source), str(tmp_path / "ours.gguf"), "-t", "Q4_K_M", *options]) == 0
    same_tensors(tmp_path / "ours.gguf", tmp_path / "theirs.gguf")


def test_a_balanced_run_ends_when_all_have_seen_enough_or_the_text_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(calibration, "FIRST_PART_TOKENS", 512)
    assert main(command(CHECKPOINT, tmp_path / "few.gguf", "--balance", "20")) == 0
    assert "had seen" not in capfd.readouterr().err
    assert read_imatrix(tmp_path / "few.gguf").chunk_count == 1
    assert main(command(CHECKPOINT, tmp_path / "many.gguf", "--balance", "200")) == 0
    err = capfd.readouterr().err
    found = read_imatrix(tmp_path / "many.gguf")
    assert found.chunk_count == 2
    few = [n for n in found.entries["blk.2.ffn_up_exps.weight"].counts.tolist() if n < 200]
    assert "after 1 of 2 chunks" in err
    assert "have seen fewer than 200 tokens" in err
    assert "the text ended before" in err
    [line] = [line for line in err.splitlines() if "layer 2: expert (tokens)" in line]
    assert all(f"({n:.0f})" in line for n in few)
    assert line.count("(") == 1 + len(few)


def test_ctrl_c_keeps_what_is_done_and_says_where(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    show = StreamMeter.show

    def interrupt(self: StreamMeter, at: LayerProgress) -> None:
        show(self, at)
        if self.share > 0.5:
            raise KeyboardInterrupt

    path = tmp_path / "x.gguf"
    with monkeypatch.context() as patched:
        patched.setattr(StreamMeter, "show", interrupt)
        assert main(command(CHECKPOINT, path)) == 130
    err = capfd.readouterr().err
    assert "interrupted at 5" in err
    assert f"{path}.stream keeps the layers that are done: repeat the command to go on from there" in err
    assert [item.name for item in tmp_path.iterdir()] == ["x.gguf.stream"]
    assert main(command(CHECKPOINT, path, "-q")) == 0
    assert path.read_bytes() == made.read_bytes()
    assert [item.name for item in tmp_path.iterdir()] == ["x.gguf"]


def test_kill_minus_9_costs_a_layer_and_no_byte(made: Path, tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "from stepgguf.cli.main import main\n"
        "from stepgguf.cli.stream_progress import StreamMeter\n"
        "def show(self, at):\n"
        "    if at.done > float(sys.argv[1]) * at.total: os.kill(os.getpid(), signal.SIGKILL)\n"
        "StreamMeter.show = show\n"
        "sys.exit(main(sys.argv[2:]))"
    )
    path = tmp_path / "x.gguf"
    for share in (0.35, 0.85):
        killed = [sys.executable, "-c", code, str(share), *command(CHECKPOINT, path, "-q")]
        assert subprocess.run(killed, check=False).returncode == -signal.SIGKILL
    assert (tmp_path / "x.gguf.stream" / "part-0" / "found-003.npz").exists()
    assert main(command(CHECKPOINT, path, "-q")) == 0
    assert path.read_bytes() == made.read_bytes()
    assert [item.name for item in tmp_path.iterdir()] == ["x.gguf"]


@pytest.mark.parametrize("package", ["torch", "tokenizers"])
def test_what_is_not_installed_is_named_with_its_extra(package: str, tmp_path: Path) -> None:
    result = without(package, *command(CHECKPOINT, tmp_path / "x.gguf"))
    assert result.returncode == 1
    hint = installed.extra_command("reference")
    assert result.stderr == f"error: this needs {package}, which is not installed\nhint: {hint}\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(command(CHECKPOINT, tmp_path / "x.gguf", "--device", "cuda")) == 1
    assert "finds no cuda device" in capfd.readouterr().err
