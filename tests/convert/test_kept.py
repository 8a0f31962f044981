"""--keep: what a conversion reads from the Hub stays on the disk, each byte fetched once, every file the Hub's."""

from __future__ import annotations

import itertools
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from threading import Event

import huggingface_hub
import pytest

from stepgguf.cli.main import main
from stepgguf.convert.sources import kept_file
from stepgguf.convert.sources.kept_folder import KeptFolder
from stepgguf.convert.sources.listed_file import ListedFile
from stepgguf.errors import OutputError
from stepgguf.files import disk
from tests.convert.hub_server import (
    COMMAND,
    FAULTS,
    HUB_ID,
    Hub,
    assert_same_files,
    journaled,
    process_environment,
    random_faults,
)

pytestmark = pytest.mark.slow

ADDRESS = f"hf:{HUB_ID}"


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_file, "PIECE", 2**16)


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    return tmp_path / "Step-3.5-Flash"


@pytest.fixture(scope="module")
def weights(repository: Path) -> int:
    return sum(path.stat().st_size for path in repository.glob("*.safetensors"))


def convert(out: Path, kept: Path, *options: str) -> int:
    return main(["convert", ADDRESS, str(out / "out.gguf"), "-t", "Q4_K_S", "-q", "--keep", str(kept), *options])


def error_of(capfd: pytest.CaptureFixture[str]) -> str:
    return " ".join(capfd.readouterr().err.replace("│", "").split())


def test_each_byte_is_fetched_once_and_the_folder_is_the_repository(
    hub: Hub, repository: Path, kept: Path, out: Path, weights: int, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ["convert", ADDRESS, str(out / "out.gguf"), "-t", "Q4_K_S", "--mtp", "drop", "--keep", str(kept)]
    assert main(command) == 0
    assert hub.range_bytes == weights
    assert_same_files(kept, repository)
    assert f"in {kept} (" in error_of(capfd)
    assert main(["convert", str(kept), str(out / "x.gguf"), "-t", "Q8_0", "--dry-run"]) == 0


def test_a_dry_run_keeps_nothing(hub: Hub, kept: Path, out: Path) -> None:
    assert convert(out, kept, "--dry-run") == 0
    assert not kept.exists()


def test_what_is_kept_is_not_fetched_again(hub: Hub, repository: Path, kept: Path, out: Path, weights: int) -> None:
    hub.fault = lambda number: "416" if number > 25 else None
    assert convert(out, kept) == 1
    assert {path.suffix for path in kept.iterdir() if "safetensors" in path.name} == {".part"}
    half = hub.range_bytes
    assert weights / 10 < half < weights
    hub.fault = lambda number: None
    assert convert(out, kept) == 0
    assert hub.range_bytes == weights
    assert_same_files(kept, repository)


def test_among_random_faults_it_is_the_same_folder(
    hub: Hub, repository: Path, kept: Path, out: Path, weights: int
) -> None:
    faults = [fault for fault in FAULTS if fault not in ("stall", "cut")]  # of a cut range a half is as good
    fault, asked = random_faults(3, 0.3, faults), itertools.count()

    def fault_and_expiry(number: int) -> str | None:
        hub.signature += number % 20 == 19
        return fault(number)

    hub.fault, hub.hub_fault = fault_and_expiry, lambda path: "500" if next(asked) % 4 == 1 else None
    assert convert(out, kept, "--threads", "4") == 0
    assert_same_files(kept, repository)
    assert hub.injected.keys() >= {*faults, "expired", "hub 500"}


def test_killed_and_repeated_it_fetches_the_rest(
    hub: Hub, repository: Path, kept: Path, out: Path, tmp_path: Path, weights: int
) -> None:
    environment = process_environment(hub, tmp_path)
    arguments = ["convert", ADDRESS, str(out / "out.gguf"), "-t", "Q4_K_S", "-q", "--keep", str(kept)]
    hub.fault = lambda number: "stall" if number > 60 else None
    process = subprocess.Popen([*COMMAND, *arguments], env=environment)
    while process.poll() is None and journaled(out / "out.gguf.journal") < 10:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before, hub.fault = hub.range_bytes, lambda number: None
    assert not list(kept.glob("*.safetensors"))
    subprocess.run([*COMMAND, *arguments], env=environment, check=True)
    assert_same_files(kept, repository)
    assert weights <= hub.range_bytes < weights + before


def test_a_file_that_is_not_the_one_that_is_listed_is_named_and_nothing_gets_its_name(
    hub: Hub, kept: Path, out: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    hub.listed_digests["model-00002.safetensors"] = "0" * 64
    for _ in range(2):
        assert convert(out, kept) == 1
        error = error_of(capfd)
        assert "model-00002.safetensors.part is not model-00002.safetensors as the Hub lists it" in error
        assert f"expected {'0' * 64}" in error
        assert not (kept / "model-00002.safetensors").exists()
        assert not (out / "out.gguf").exists()


def test_a_disk_that_is_too_small_is_known_before(
    hub: Hub, tiny_disk: Path, out: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert convert(out, tiny_disk / "kept") == 1
    error = error_of(capfd)
    assert f"{tiny_disk}/kept has 12.0 MiB free, what is missing of {ADDRESS} takes 20.9 MiB" in error
    assert "choose a folder on another disk with --keep" in error
    assert hub.ranges == 0
    assert not list((tiny_disk / "kept").iterdir())
    subprocess.run(["mount", "-o", "remount,size=24m", tiny_disk], check=True)
    assert convert(tiny_disk, tiny_disk / "kept") == 1
    error = error_of(capfd)
    assert f"error: {tiny_disk} has " in error
    assert "of it for working files" in error
    assert "or no --keep" in error


def test_a_disk_that_fills_up_on_the_way_is_named_and_the_same_command_goes_on(
    hub: Hub, repository: Path, tiny_disk: Path, out: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    subprocess.run(["mount", "-o", "remount,size=32m", tiny_disk], check=True)
    kept, filler = tiny_disk / "kept", tiny_disk / "filler"

    def fill(number: int) -> None:
        if number == 15:
            with filler.open("wb", buffering=0) as file, suppress(OSError):
                while file.write(bytes(4096)):
                    pass

    hub.fault = fill
    assert convert(out, kept) == 1
    assert f"{kept}: the disk is full" in error_of(capfd)
    assert not list(kept.glob("*.safetensors"))
    filler.unlink()
    assert convert(out, kept) == 0
    assert_same_files(kept, repository)


def test_a_folder_of_another_version_is_left_alone(
    hub: Hub, kept: Path, out: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    kept.mkdir()
    (kept / "model-00001.safetensors.part").write_bytes(b"another download")
    assert convert(out, kept) == 1
    assert "model-00001.safetensors.part is of another version of model-00001.safetensors" in error_of(capfd)
    (kept / "model-00001.safetensors.part").rename(kept / "model-00001.safetensors")
    assert convert(out, kept) == 1
    assert "model-00001.safetensors has 16 bytes, and hf:" in error_of(capfd)
    assert (kept / "model-00001.safetensors").read_bytes() == b"another download"


def test_two_processes_do_not_keep_in_one_folder(
    hub: Hub, kept: Path, out: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    kept.mkdir()
    held = disk.hold(kept / "model-00001.safetensors.part", make=True)
    try:
        assert convert(out, kept) == 1
    finally:
        disk.release(held, kept / "model-00001.safetensors.part")
    assert "model-00001.safetensors.part is in use: another stepgguf keeps it" in error_of(capfd)


def test_what_the_cache_has_is_copied(hub: Hub, repository: Path, kept: Path, out: Path) -> None:
    for path in repository.glob("*.safetensors"):
        huggingface_hub.HfApi().hf_hub_download(HUB_ID, path.name, revision=hub.commit)
    hub.fault = lambda number: "416"
    assert convert(out, kept) == 0
    assert_same_files(kept, repository)


def test_the_output_does_not_take_the_place_of_what_is_kept(tmp_path: Path) -> None:
    kept = KeptFolder(tmp_path)
    kept.begin(Path(ADDRESS), [ListedFile("Q8/x.gguf", 1, "0" * 64, is_lfs=True)], Event())
    kept.refuse_names([tmp_path / "y.gguf"])
    with pytest.raises(OutputError, match=r"x\.gguf is where the source is kept"):
        kept.refuse_names([tmp_path / "y.gguf", tmp_path / "z" / ".." / "x.gguf"])


def test_only_what_is_on_the_hub_is_kept(small: Path, out: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(small), str(out / "x.gguf"), "--keep", str(out / "kept")]) == 2
    assert "is on this disk already" in error_of(capfd)
