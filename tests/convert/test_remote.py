"""hf:ORG/NAME: converted straight from the Hub, over connections on which everything goes wrong, to the same bytes."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from pathlib import Path

import huggingface_hub
import pytest

from stepgguf.cli.main import main
from stepgguf.convert.journal import RECORD_BYTES
from stepgguf.convert.sources.checkpoint import Checkpoint
from stepgguf.convert.sources.hub import HubAddress, hub_address
from stepgguf.convert.sources.opening import open_source
from stepgguf.convert.sources.remote_file import asked_pause
from stepgguf.errors import CheckpointError, HubError
from stepgguf.files import disk, installed
from tests.conftest import INTERRUPTIBLE
from tests.convert.hub_server import (
    COMMAND,
    FAULTS,
    HUB_ID,
    Hub,
    assert_same_files,
    digest_of,
    journaled,
    process_environment,
    random_faults,
    serving,
    set_endpoint,
)

pytestmark = pytest.mark.slow

ADDRESS = f"hf:{HUB_ID}"
OTHER_COMMIT = "2e" * 20


@pytest.fixture(scope="module")
def whole(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what a local conversion writes, of the same repository in the Hub's cache."""
    snapshot = tmp_path_factory.mktemp("cache") / f"models--{HUB_ID.replace('/', '--')}" / "snapshots" / ("1f" * 20)
    shutil.copytree(repository, snapshot)
    folder = tmp_path_factory.mktemp("whole")
    assert main(["convert", str(snapshot), str(folder / "out.gguf"), "-t", "Q4_K_S", "-q"]) == 0
    return folder


def convert(dest: Path, *options: str) -> int:
    return main(["convert", ADDRESS, str(dest), "-t", "Q4_K_S", "-q", *options])


# the same bytes ---------------------------------------------------------------------------------------------------


def test_the_bytes_are_a_local_conversions_and_no_weights_reach_the_disk(
    hub: Hub, repository: Path, out: Path, tmp_path: Path, whole: Path
) -> None:
    used: list[int] = []
    hub.fault = lambda number: used.append(disk.used_bytes(tmp_path))  # at each range
    assert convert(out / "out.gguf") == 0
    assert_same_files(out, whole)
    assert max(used) <= disk.used_bytes(tmp_path)  # never more than the output, with its manifest, and the small files
    cached = {path.name for path in (tmp_path / "cache").rglob("snapshots/*/*")}
    assert cached == {path.name for path in repository.iterdir() if path.suffix != ".safetensors"}
    small = sum(path.stat().st_size for path in repository.iterdir() if path.suffix != ".safetensors")
    assert sum(path.stat().st_size for path in (tmp_path / "cache").rglob("blobs/*")) == small
    weights = sum(path.stat().st_size for path in repository.glob("*.safetensors"))
    assert hub.range_bytes < 2 * weights  # once, but for what small reads round up


def test_every_command_reads_from_the_hub(hub: Hub, out: Path, whole: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", f"{ADDRESS}@main"]) == 0
    assert "a checkpoint of 5 layers and 3 MTP blocks" in capfd.readouterr().out
    assert main(["plan", ADDRESS, "--machine", "spark"]) == 0
    assert main(["convert", ADDRESS, str(out) + os.sep, "-t", "Q4_K_S", "--dry-run"]) == 0
    assert "Step-3.5-Flash-Q4_K_S.gguf" in capfd.readouterr().err
    assert main(["verify", str(whole / "out.gguf"), "--against", ADDRESS, "--all"]) == 0
    assert main(["quantize", ADDRESS, str(out / "out.gguf"), "-t", "Q4_K_S", "-q"]) == 0
    assert_same_files(out, whole)
    assert main(["imatrix", ADDRESS, "-o", str(out / "i.gguf"), "--dry-run"]) == 0


def test_values_of_fp8_are_the_same(small_fp8: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(Hub(small_fp8)) as fp8, Checkpoint(small_fp8) as local:
        set_endpoint(monkeypatch, fp8.url)
        with open_source(Path(ADDRESS)) as remote:
            for name, tensor in local.tensors.items():
                rows = tensor.n_bytes // tensor.row_bytes
                assert (remote.raw(name, 0, rows) == local.raw(name, 0, rows)).all()
                stop = min(rows, 300)
                ours, theirs = remote.values(name, 0, stop), local.values(name, 0, stop)
                assert type(ours) is type(theirs)


# what goes wrong on the way ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_survived(hub: Hub, repository: Path, fault: str) -> None:
    shard = repository / "model-00001.safetensors"
    with Checkpoint(Path(ADDRESS)) as checkpoint:
        file = checkpoint._files[Path(ADDRESS) / shard.name]
        hub.ranges, hub.fault = 0, lambda number: fault if number < 2 else None
        into = bytearray(200_000)
        file.read_at(into, 300_001, "x")
    assert into == shard.read_bytes()[300_001:500_001]
    assert (hub.ranges, hub.injected[fault]) == (3, 2)


def test_a_conversion_among_random_faults_has_the_same_bytes(hub: Hub, out: Path, whole: Path) -> None:
    faults = [fault for fault in FAULTS if fault != "stall"]  # which takes its time: one in its own test
    fault, asked = random_faults(7, 0.3, faults), itertools.count()

    def fault_and_expiry(number: int) -> str | None:
        hub.signature += number % 20 == 19
        return fault(number)

    hub.fault, hub.hub_fault = fault_and_expiry, lambda path: "500" if next(asked) % 4 == 1 else None
    assert convert(out / "out.gguf", "--threads", "4") == 0
    assert_same_files(out, whole)
    assert hub.injected.keys() >= {*faults, "expired", "hub 500"}
    assert sum(hub.injected.values()) > 100


def test_what_never_passes_is_an_error_and_the_same_command_goes_on(
    hub: Hub, out: Path, whole: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    hub.fault = lambda number: "503" if number > 40 else None
    assert convert(out / "out.gguf") == 1
    err = capfd.readouterr().err
    assert f"{ADDRESS}/model-0000" in err
    assert "bytes " in err
    assert "the server answered 503 Service Unavailable (10 attempts)" in " ".join(err.split())
    assert "repeat the command: it goes on from there" in " ".join(err.split())
    assert not (out / "out.gguf").exists()
    done = (out / "out.gguf.journal").stat().st_size // RECORD_BYTES
    assert done > 10
    hub.fault, hub.ranges = lambda number: None, 0
    assert convert(out / "out.gguf") == 0
    assert_same_files(out, whole)


def test_a_server_that_is_gone_is_an_error(hub: Hub, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_endpoint(monkeypatch, "http://127.0.0.1:9")
    with pytest.raises(HubError, match=r"http://127\.0\.0\.1:9 could not be reached: .*refused \(4 attempts\)"):
        Checkpoint(Path(ADDRESS))


def test_an_endpoint_that_is_no_address_is_named(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    set_endpoint(monkeypatch, "huggingface.example")
    with pytest.raises(HubError, match=r"huggingface\.example is no address of a server"):
        Checkpoint(Path(ADDRESS))


@pytest.mark.parametrize("suffix", ["-2", "0"])
def test_a_file_that_changes_is_an_error(hub: Hub, repository: Path, suffix: str) -> None:
    with Checkpoint(Path(ADDRESS)) as checkpoint:
        file = checkpoint._files[Path(ADDRESS) / "model-00001.safetensors"]
        hub.etag_suffix = suffix
        with pytest.raises(
            HubError, match=r"model-00001\.safetensors: the file has changed .* its ETag was \w+, and is"
        ):
            file.read_at(bytearray(100_000), 0, "x")
        hub.signature += 1
        with pytest.raises(HubError, match="its X-Linked-ETag was"):
            file.read_at(bytearray(100_000), 0, "x")


def test_another_commit_does_not_go_on_with_an_interrupted_run(
    hub: Hub, out: Path, whole: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    hub.fault = lambda number: "416" if number > 40 else None
    assert convert(out / "out.gguf") == 1
    hub.commit, hub.fault = OTHER_COMMIT, lambda number: None
    capfd.readouterr()
    assert convert(out / "out.gguf") == 1
    err = capfd.readouterr().err
    assert f"{ADDRESS}@{'1f' * 20}" in "".join(err.split())
    assert f"{ADDRESS}@{OTHER_COMMIT}" in "".join(err.split())
    assert f"Repeat that command at its commit ({ADDRESS}@{'1f' * 20}) to finish it" in " ".join(err.split())
    hub.commit = "1f" * 20
    assert main(["convert", f"{ADDRESS}@{hub.commit}", str(out / "out.gguf"), "-t", "Q4_K_S", "-q"]) == 0
    assert_same_files(out, whole)


def test_the_token_goes_to_the_hub_alone_and_is_shown_nowhere(
    hub: Hub, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    hub.token = "hf_" + "s3cret" * 5
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert main(["convert", ADDRESS, str(out / "x.gguf"), "-t", "Q8_0"]) == 0
    assert hub.cdn_authorizations == {None}
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and hub.token.encode() in path.read_bytes()]
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert main(["inspect", ADDRESS]) == 1
    captured = capfd.readouterr()
    said = " ".join(captured.err.split())
    assert f"error: {ADDRESS}: its owner asks for consent" in said
    assert f"Accept its terms at {hub.url}/{HUB_ID}" in said
    assert hub.token not in captured.out + captured.err
    assert "hf_wrong" not in captured.out + captured.err


def test_a_shard_that_was_downloaded_is_not_read_again(hub: Hub, out: Path, whole: Path) -> None:
    hub.fault = lambda number: "416" if number > 40 else None
    assert convert(out / "out.gguf") == 1
    hub.fault = lambda number: None
    for name in ("model-00001.safetensors", "model-00002.safetensors"):
        huggingface_hub.HfApi().hf_hub_download(HUB_ID, name, revision=hub.commit)
    hub.fault = lambda number: "416"
    assert convert(out / "out.gguf") == 0
    assert_same_files(out, whole)


# a real process ---------------------------------------------------------------------------------------------------


def test_killed_and_repeated_it_has_the_same_bytes(hub: Hub, out: Path, tmp_path: Path, whole: Path) -> None:
    hub.fault = random_faults(1, 0.02, ["cut", "reset"])
    environment = process_environment(hub, tmp_path)
    command = [*COMMAND, "convert", ADDRESS, str(out / "out.gguf"), "-t", "Q4_K_S", "-q"]
    journal = out / "out.gguf.journal"
    process = subprocess.Popen(command, env=environment)
    while process.poll() is None and journaled(journal) < 20:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert journaled(journal) >= 20
    subprocess.run(command, env=environment, check=True)
    assert_same_files(out, whole)


def test_ctrl_c_does_not_wait_for_a_dead_network(hub: Hub, out: Path, tmp_path: Path) -> None:
    hub.fault = lambda number: "503" if number > 40 else None
    command = [*INTERRUPTIBLE, "convert", ADDRESS, str(out / "out.gguf"), "-t", "Q4_K_S"]
    process = subprocess.Popen(command, env=process_environment(hub, tmp_path), stderr=subprocess.PIPE, text=True)
    while hub.injected["503"] < 8:
        time.sleep(0.01)
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "repeat the command to go on from there" in err
    assert time.monotonic() - started < 10


def test_without_the_extra_it_says_what_to_install(tmp_path: Path) -> None:
    code = "import sys; sys.modules['huggingface_hub'] = None; from stepgguf.cli.main import run; run()"
    command = [sys.executable, "-c", code, "convert", ADDRESS, str(tmp_path / "x.gguf")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = f"error: this needs huggingface_hub, which is not installed\nhint: {installed.extra_command('hub')}\n"
    assert (done.returncode, done.stderr) == (1, said)


# addresses --------------------------------------------------------------------------------------------------------


def test_what_an_address_means() -> None:
    assert hub_address(Path("hf:a/b")) == HubAddress("a/b")
    assert hub_address(Path("hf://a/b")) == HubAddress("a/b")
    assert hub_address(Path("hf:a/b@refs/pr/1")) == HubAddress("a/b", "refs/pr/1")
    assert hub_address(Path("a/b")) is None
    assert hub_address(Path("hf:a/b/q/c.gguf")) == HubAddress("a/b", None, "q/c.gguf")
    assert hub_address(Path("hf:a/b@refs/pr/1/c.gguf")) == HubAddress("a/b", "refs/pr/1", "c.gguf")
    branch = HubAddress("a/b", "my/branch", "c.gguf")
    assert hub_address(Path("hf:a/b@my%2Fbranch/c.gguf")) == branch
    assert hub_address(branch.path) == branch
    for page in (
        "https://huggingface.co/a/b",
        "http://huggingface.co/a/b/",
        "hf.co/a/b?library=x",
        "https://hf.co/a/b#x",
    ):
        assert hub_address(Path(page)) == HubAddress("a/b")
    assert hub_address(Path("https://huggingface.co/a/b/tree/v1")) == HubAddress("a/b", "v1")
    assert hub_address(Path("https://huggingface.co/a/b/tree/refs%2Fpr%2F1")) == HubAddress("a/b", "refs/pr/1")
    assert hub_address(Path("https://huggingface.co/a/b/tree/main/q")) == HubAddress("a/b", "main", "q")
    for kind in ("blob", "resolve"):
        page = f"https://huggingface.co/a/b/{kind}/main/q/c.gguf?download=true"
        assert hub_address(Path(page)) == HubAddress("a/b", "main", "q/c.gguf")
    for text in (
        "hf:",
        "hf:a",
        "hf:a/b@",
        "hf:a/..",
        "hf:a b/c",
        "https://huggingface.co/a",
        "hf.co/a/b/discussions/1",
    ):
        with pytest.raises(CheckpointError, match="not the address of a model on the Hugging Face Hub"):
            hub_address(Path(text))


@pytest.mark.parametrize(
    ("address", "text"),
    [
        ("hf:nobody/nothing", "hf:nobody/nothing: there is no such model at http"),
        (f"{ADDRESS}@v9", f"{ADDRESS}@v9: there is no such revision"),
    ],
)
def test_what_is_not_there_is_named(hub: Hub, address: str, text: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", address]) == 1
    assert text in " ".join(capfd.readouterr().err.split())


def test_a_repository_of_something_else_is_named(hub: Hub, repository: Path) -> None:
    hub.digests = {"README.md": "0" * 40, "pytorch_model.bin": "0" * 40}
    (repository / "pytorch_model.bin").touch()
    hub.digests["README.md"] = digest_of(repository / "README.md")
    try:
        with pytest.raises(CheckpointError, match=f"{ADDRESS} holds PyTorch pickles"):
            Checkpoint(Path(ADDRESS))
    finally:
        (repository / "pytorch_model.bin").unlink()


def test_a_pause_is_asked_for_in_seconds_or_as_a_date() -> None:
    soon = datetime.now(timezone.utc) + timedelta(seconds=50)
    assert asked_pause({"Retry-After": "7"}) == 7.0
    assert asked_pause({"Retry-After": format_datetime(soon, usegmt=True)}) == pytest.approx(50, abs=2)
    assert asked_pause({"RateLimit": '"resolvers";r=0;t=55'}) == 55.0
    assert asked_pause({"RateLimit": '"resolvers";r=12;t=55'}) is None
    assert asked_pause({"Retry-After": "soon"}) is None
    assert asked_pause({}) is None
