"""The command line as a user meets it."""

from __future__ import annotations

import io
import json
import re
import resource
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from stepgguf import __version__
from stepgguf.cli.arguments import parse_size
from stepgguf.cli.main import main
from stepgguf.demo import CHECKPOINT
from stepgguf.model.hparams import HParams
from stepgguf.model.tensors import tensor_specs
from tests.conftest import DATA, real_config

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _no_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))


COMMANDS = (
    "convert quantize imatrix plan recipes inspect verify eval report card list rm template chat serve launch setup "
    "doctor bench demo".split()
)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples(command: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    text = capfd.readouterr().out
    assert "Examples:" in text
    assert f"stepgguf {command}" in text or command == "chat"


def test_the_page_of_commands_lists_each_in_the_order_of_help() -> None:
    page = (Path(__file__).parents[2] / "docs" / "commands.md").read_text()
    assert re.findall(r"^\| `stepgguf (\w+)", page, re.MULTILINE) == COMMANDS


def test_version(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capfd.readouterr().out == f"stepgguf {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["convert"], "Missing argument"),
        (["convert", "a", "b", "--mtp", "both"], "'both' is not one of 'include', 'separate', 'drop'"),
        (["plan", "a", "--mtp", "separate"], "'separate' is not one of 'include', 'drop'"),
        (["convert", "a", "b", "--kernel", "x"], "'x' is not one of 'lanes', 'ggml'"),
        (["convert", "a", "b", "--imatrix-prior", "x"], "'x' is not one of 'pooled', 'flat'"),
        (["verify", "a", "--imatrix-prior", "x"], "'x' is not one of 'pooled', 'flat'"),
        (["convert", "a", "b", "--split-max-size", "big"], "'big' is not a size"),
        (["convert", "a", "b", "--memory", "0"], "a size must be positive"),
        (["chat", "x.gguf", "-p", ""], "there is nothing to answer"),
        (["chat", "x.gguf", "-p", "a", "--thinking", "loud"], "'loud' is not one of 'full', 'fold', 'hide'"),
        (["nonsense"], "No such command"),
    ],
)
def test_wrong_usage_exits_2(arguments: list[str], text: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert text in " ".join(re.sub(r"[│╭╮╰╯─]", " ", capfd.readouterr().err).split())


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["convert", "/nowhere", "x.gguf"], "/nowhere: no such file"),
        (["convert", "/nowhere", "x.gguf", "--type", "Q9"], "unknown type or recipe 'Q9'"),
        (["inspect", "/nowhere.gguf"], "/nowhere.gguf: No such file or directory"),
        (["verify", __file__], "not b'GGUF'"),
        (["chat", __file__, "-p", "hi"], "not b'GGUF'"),
        (["quantize", __file__, "x.gguf"], "not b'GGUF'"),
        (["template", __file__], "not b'GGUF'"),
    ],
)
def test_errors_are_two_lines_without_a_traceback(
    arguments: list[str], text: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert text in err
    assert err.startswith("error: ")
    assert "hint: " in err
    assert "Traceback" not in err


def test_debug_shows_the_traceback() -> None:
    command = [sys.executable, "-m", "stepgguf", "inspect", "/nowhere.gguf", "--debug"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "Traceback" in result.stderr


def test_quantize_does_not_overwrite_its_source(small: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    assert main(["convert", str(small), str(path), "-t", "BF16", "-q"]) == 0
    before = path.read_bytes()
    assert main(["quantize", str(path), str(path), "-t", "Q8_0", "--overwrite"]) == 1
    assert path.read_bytes() == before


def without(packages: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a process where some packages are not installed."""
    code = f"import sys\nfor name in {packages.split()}: sys.modules[name] = None\n"
    code += "from stepgguf.cli.main import main\nsys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)


@pytest.mark.slow
def test_a_machine_that_only_converts_needs_no_llama_cpp_python(small: Path, tmp_path: Path) -> None:
    lean = "llama_cpp torch safetensors tokenizers transformers"
    options = ["-t", "Q4_K_M", "--name", "x", "-q"]
    result = without(lean, "convert", str(small), str(tmp_path / "a.gguf"), *options)
    assert (result.returncode, result.stderr) == (0, "")
    assert main(["convert", str(small), str(tmp_path / "b.gguf"), *options]) == 0
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    result = without(lean, "convert", str(small), str(tmp_path / "c.gguf"), "--kernel", "ggml")
    assert result.returncode == 1
    assert "stepgguf setup" in result.stderr
    assert not list(tmp_path.glob("c.gguf*"))


def test_what_is_not_installed_is_named(tmp_path: Path) -> None:
    result = without("llama_cpp", "chat", "x.gguf", "-p", "hi")
    assert result.returncode == 1
    said = "error: this needs llama_cpp, which is not installed\nhint: stepgguf setup\n"
    assert result.stderr == said


@pytest.mark.slow
def test_a_machine_that_only_runs_needs_no_torch() -> None:
    result = without("torch safetensors tokenizers transformers", "demo")
    assert result.returncode == 0, result.stderr
    assert result.stdout == "There are 3 'r's.\n"


def test_a_directory_as_destination_names_the_file(small: Path, tmp_path: Path) -> None:
    assert main(["convert", str(small), str(tmp_path), "-t", "q8_0", "-q"]) == 0
    assert (tmp_path / "small-Q8_0.gguf").exists()


def test_json_is_the_only_thing_on_stdout(small: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(small), str(tmp_path / "x.gguf"), "-t", "Q8_0", "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert report["files"] == [{"path": str(tmp_path / "x.gguf"), "bytes": (tmp_path / "x.gguf").stat().st_size}]
    assert report["tensors"] == 130
    assert report["peak_rss_bytes"] > 10**7


@pytest.mark.slow
def test_piped_progress_is_plain_lines_and_quiet_is_silent(small: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "stepgguf", "convert", str(small), "-t", "Q8_0"]
    loud = subprocess.run([*command, str(tmp_path / "a.gguf")], capture_output=True, text=True, check=True)
    assert re.search(r"wrote .*a\.gguf \([\d.]+ MiB\)\n.* bpw, .* s, .* MB/s out, peak memory", loud.stderr)
    assert "\x1b" not in loud.stderr
    quiet = subprocess.run([*command, str(tmp_path / "b.gguf"), "-q"], capture_output=True, text=True, check=True)
    assert quiet.stdout + quiet.stderr == ""


def sparse_checkpoint(path: Path) -> Path:
    """The real 394 GB checkpoint as 24 sparse shards: every header is there, and no weights."""
    path.mkdir()
    shards: dict[str, list[tuple[str, tuple[int, ...], str]]] = {}
    wanted = {spec.source for spec in tensor_specs(HParams.from_config(real_config()))}
    for line in (DATA / "step-3.7-flash-tensors.tsv").read_text().splitlines()[1:]:
        name, shape, shard, dtype, _ = line.split("\t")
        if name in wanted:
            shards.setdefault(shard, []).append((name, tuple(json.loads(shape)), dtype))
    for shard, tensors in shards.items():
        header, end = {}, 0
        for name, shape, dtype in tensors:
            size = {"BF16": 2, "F32": 4}[dtype]
            for extent in shape:
                size *= extent
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(header).encode()
        with (path / shard).open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + end)
    (path / "config.json").write_text(json.dumps(real_config()))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(CHECKPOINT / name, path)
    return path


def test_a_dry_run_of_the_real_model_takes_two_seconds(tmp_path: Path) -> None:
    source = sparse_checkpoint(tmp_path / "Step-3.5-Flash")
    command = [sys.executable, "-m", "stepgguf", "convert", str(source), str(tmp_path / "x.gguf"), "--dry-run"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run([*command, "-t", "Q4_K_M"], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime  # this machine may be busy
    lines = {" ".join(line.split()[:5]) for line in result.stdout.splitlines()}
    assert "blk.3-4,7,10,13,16,19,22,25,28,31,34,37,39-44 ffn_down_exps 19x Q6_K 21.9" in lines
    assert "blk.3-44 ffn_gate_exps 42x Q4_K 33.2" in lines
    assert "blk.45-47 nextn.shared_head_head 3x Q8_0 1.57" in lines
    assert "more bits: first and last eighth, every third between" in result.stdout
    # 118.58 GB of the trunk (llama.cpp's own figure) and three MTP blocks in Q8_0
    assert result.stdout.splitlines()[-1] == "805 tensors in 1 file, 112.8 GiB (121.16 GB), 4.861 bpw"
    assert not (tmp_path / "x.gguf").exists()
    assert seconds < 2.0


def test_too_large_for_the_disk_is_refused_before_the_start(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = sparse_checkpoint(tmp_path / "real")
    if shutil.disk_usage(tmp_path).free > 780e9:
        pytest.skip("this disk would hold it")
    assert main(["convert", str(source), str(tmp_path / "x.gguf"), "-t", "F32", "-q"]) == 1
    assert re.search(r"has .* GiB free, the output needs 7\d\d\.\d GiB", capfd.readouterr().err)
    assert not list(tmp_path.glob("x.gguf*"))


@pytest.mark.parametrize(
    ("text", "n"), [("50G", 50 * 10**9), ("2GiB", 2**31), ("1.5M", 1_500_000), ("7", 7), ("64 KiB", 65536), (9, 9)]
)
def test_sizes(text: str | int, n: int) -> None:
    assert parse_size(text) == n
