"""stepgguf doctor: on this machine for real, and on machines of each kind with the real model's header."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from stepgguf.cli.doctor import doctor, finding_lines
from stepgguf.cli.main import main
from stepgguf.files import folders
from stepgguf.fit.capacity import Finding

app = typer.Typer()
app.command("doctor")(doctor)


@pytest.fixture(scope="module")
def small_gguf(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("doctor") / "small.gguf"
    assert main(["convert", str(small), str(path), "-t", "Q8_0", "-q"]) == 0
    return path


# on this machine ----------------------------------------------------------------------------------------------------


def test_this_machine_runs_a_small_model(small_gguf: Path) -> None:
    result = CliRunner().invoke(app, [str(small_gguf)])
    assert result.exit_code == 0, result.output
    assert re.search(rf"^ok    file       {re.escape(str(small_gguf))}: .* MiB, 8 blocks$", result.output, re.MULTILINE)
    assert re.search(r"^ok    memory     .* = .* weights \+ .* KV cache for 4,096 tokens", result.output, re.MULTILINE)


def test_json_says_the_same(small_gguf: Path) -> None:
    result = CliRunner().invoke(app, [str(small_gguf), "--ctx", "1000", "--parallel", "2", "--json"])
    report = json.loads(result.stdout)
    assert (result.exit_code, report["ok"]) == (0, True)
    assert {"machine", "engine", "file", "memory"} <= {finding["subject"] for finding in report["findings"]}
    # 2 full layers of 1024 cells and 3 sliding ones of 32 x 2 + 512, padded: 768; 2 heads x 64, K and V, F16
    assert report["need"]["kv"] == (2 * 1024 + 3 * 768) * 2 * 2 * 64 * 2
    assert report["machine"]["ram"] > 0


def test_without_a_file_it_looks_at_the_machine_alone() -> None:
    subjects = {finding["subject"] for finding in json.loads(CliRunner().invoke(app, ["--json"]).stdout)["findings"]}
    assert {"machine", "engine"} <= subjects
    assert not {"file", "memory"} & subjects


def test_it_says_where_sessions_and_caches_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "data", lambda: tmp_path / "d" / "stepgguf")
    monkeypatch.setattr(folders, "cache", lambda: tmp_path / "c" / "stepgguf")
    output = CliRunner().invoke(app, []).output
    assert f"sessions, also of agents, and what was typed in {tmp_path}/d/stepgguf; " in output
    assert f"kernels and measured errors in {tmp_path}/c/stepgguf" in output
    assert not list(tmp_path.iterdir()), "it only looks"


@pytest.mark.parametrize("n_bytes", [1000, 100_000])
def test_a_file_that_is_still_being_downloaded_fails(small_gguf: Path, tmp_path: Path, n_bytes: int) -> None:
    (tmp_path / "cut.gguf").write_bytes(small_gguf.read_bytes()[:n_bytes])
    result = CliRunner().invoke(app, [str(tmp_path / "cut.gguf")])
    assert result.exit_code == 1
    assert re.search(r"^fail  file .*\n +(Make or download|The download)", result.output, re.MULTILINE)


def test_a_file_that_is_no_model_fails(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, [__file__, "--json"])
    assert result.exit_code == 1
    assert not json.loads(result.stdout)["ok"]


@pytest.mark.slow
def test_without_llama_cpp_python_it_says_how_to_get_it(small_gguf: Path) -> None:
    code = (
        "import sys; sys.modules['llama_cpp'] = None\nimport typer\nfrom stepgguf.cli.doctor import doctor\n"
        "app = typer.Typer(); app.command()(doctor); app()"
    )
    command = [sys.executable, "-c", code, str(small_gguf)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (1, "")
    assert "fail  engine     llama-cpp-python is not installed\n                 stepgguf setup\n" in result.stdout
    assert "ok    memory" in result.stdout


@pytest.mark.slow
def test_a_file_of_mtp_blocks_alone_is_no_model(small: Path, tmp_path: Path) -> None:
    assert main(["convert", str(small), str(tmp_path / "x.gguf"), "-t", "F16", "--mtp", "separate", "-q"]) == 0
    trunk, heads = sorted(tmp_path.glob("*.gguf"), key=lambda path: -path.stat().st_size)
    result = CliRunner().invoke(app, [str(heads)])
    assert result.exit_code == 1
    assert "holds no trunk, only MTP blocks" in result.output
    result = CliRunner().invoke(app, [str(trunk)])
    assert result.exit_code == 0
    assert f"8 blocks, those of {heads} included" in result.output
    heads.rename(tmp_path / "elsewhere.gguf")
    result = CliRunner().invoke(app, [str(trunk)])
    assert result.exit_code == 0
    assert "--mtp include" in result.output
    result = CliRunner().invoke(app, [str(trunk), "--mtp-file", str(tmp_path / "elsewhere.gguf")])
    assert "8 blocks, those of" in result.output
    result = CliRunner().invoke(app, [str(trunk), "--mtp-file", str(trunk)])
    assert (result.exit_code, "holds no MTP blocks" in result.output) == (1, True)


def test_a_finding_is_a_line_with_its_fix_below() -> None:
    assert finding_lines(Finding("ok", "engine", "fine")) == "ok    engine     fine\n"
    assert finding_lines(Finding("warn", "swap", "on", "off")) == "warn  swap       on\n                 off\n"
