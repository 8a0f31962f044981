"""hf:ORG/NAME/FILE.gguf: a GGUF on the Hub is the source that it is on this disk."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from stepgguf.cli.main import main
from stepgguf.cli.plan_text import next_command
from stepgguf.convert.sources import kept_file
from stepgguf.convert.sources.opening import open_source
from stepgguf.files import gguf_header
from stepgguf.fit.memory import ContextParams
from stepgguf.fit.planning import plan_for_machine, target_machine
from tests.convert.hub_server import (
    COMMAND,
    FAULTS,
    HUB_ID,
    Hub,
    assert_same_files,
    journaled,
    process_environment,
    random_faults,
    serving,
    set_endpoint,
)

pytestmark = pytest.mark.slow

ADDRESS = f"hf:{HUB_ID}"
PARTS = [f"BF16/step-{i:05d}-of-00003.gguf" for i in (1, 2, 3)]


@pytest.fixture(scope="module")
def ggufs(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with a split GGUF in a folder."""
    folder = tmp_path_factory.mktemp("ggufs")
    (folder / "BF16").mkdir()
    made = folder / "BF16" / "step.gguf"
    assert main(["convert", str(small), str(made), "-t", "BF16", "-q", "--split-max-size", "9M"]) == 0
    for path in (folder / "BF16").glob("*.json"):
        path.unlink()
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*.gguf")) == PARTS
    (folder / "README.md").write_text("GGUFs\n")
    return folder


@pytest.fixture(scope="module")
def quantized(ggufs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized")
    assert main(["quantize", str(ggufs / PARTS[0]), str(folder / "out.gguf"), "-t", "Q4_K_S", "-q"]) == 0
    return folder


@pytest.fixture
def gguf_hub(hub: Hub, ggufs: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving(Hub(ggufs)) as served:
        set_endpoint(monkeypatch, served.url)
        yield served


def said(capfd: pytest.CaptureFixture[str]) -> str:
    return " ".join(capfd.readouterr().err.split())


def test_the_bytes_are_a_local_files(gguf_hub: Hub, out: Path, quantized: Path) -> None:
    assert main(["quantize", f"{ADDRESS}@main/{PARTS[2]}", str(out / "out.gguf"), "-t", "Q4_K_S", "-q"]) == 0
    assert_same_files(out, quantized)


@pytest.mark.parametrize("place", ["", "/BF16", f"/{PARTS[1]}", f"@{'1f' * 20}/BF16"])
def test_it_is_found_by_each_of_its_parts(gguf_hub: Hub, place: str) -> None:
    with open_source(Path(ADDRESS + place)) as source:
        repository = Path(f"hf:{HUB_ID}{place.partition('/')[0]}")
        assert [*source.files] == [repository / part for part in PARTS]
        assert source.name == "step"


def test_among_random_faults_it_has_the_same_bytes(gguf_hub: Hub, out: Path, quantized: Path) -> None:
    gguf_hub.fault = random_faults(5, 0.3, [fault for fault in FAULTS if fault != "stall"])
    assert main(["quantize", f"{ADDRESS}/BF16", str(out / "out.gguf"), "-t", "Q4_K_S", "-q", "--threads", "4"]) == 0
    assert_same_files(out, quantized)
    assert sum(gguf_hub.injected.values()) > 20


def test_killed_and_repeated_it_has_the_same_bytes(gguf_hub: Hub, out: Path, tmp_path: Path, quantized: Path) -> None:
    environment = process_environment(gguf_hub, tmp_path)
    command = [*COMMAND, "quantize", f"{ADDRESS}/{PARTS[1]}", str(out / "out.gguf"), "-t", "Q4_K_S", "-q"]
    gguf_hub.fault = lambda number: "stall" if number > 60 else None
    process = subprocess.Popen(command, env=environment)
    while process.poll() is None and journaled(out / "out.gguf.journal") < 10:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    gguf_hub.fault = lambda number: None
    subprocess.run(command, env=environment, check=True)
    assert_same_files(out, quantized)


def test_it_is_kept(
    gguf_hub: Hub, ggufs: Path, out: Path, quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_file, "PIECE", 2**16)
    kept = tmp_path / "kept"
    command = ["quantize", f"{ADDRESS}/BF16", str(out / "out.gguf"), "-t", "Q4_K_S", "-q", "--keep", str(kept)]
    assert main(command) == 0
    assert_same_files(out, quantized)
    assert_same_files(kept, ggufs / "BF16")
    assert gguf_hub.range_bytes == sum((ggufs / part).stat().st_size for part in PARTS)


def test_every_command_reads_it(gguf_hub: Hub, out: Path, quantized: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", f"{ADDRESS}/{PARTS[0]}"]) == 0
    assert "5 layers and 3 MTP blocks" in capfd.readouterr().out
    assert main(["plan", f"{ADDRESS}/BF16", "--machine", "spark"]) == 0
    assert f"next: hf download {HUB_ID} --include 'BF16/*' --local-dir Step-3.5-Flash" in said(capfd)
    with open_source(Path(ADDRESS)) as source:
        result = plan_for_machine(source, target_machine("spark"), ContextParams(1024), ["Q8_0"])
    commands = {row.type: next_command(Path(ADDRESS), result, row) for row in result.rows}
    assert commands["Q8_0"] == f"stepgguf quantize {ADDRESS} models/ --type Q8_0"
    assert main(["verify", f"{ADDRESS}/{PARTS[1]}"]) == 1
    assert f"hf download {HUB_ID} --include 'BF16/step-*.gguf' --local-dir Step-3.5-Flash" in said(capfd)
    assert main(["verify", str(quantized / "out.gguf"), "--against", ADDRESS]) == 0
    assert main(["imatrix", ADDRESS, "-o", str(out / "i.gguf"), "--dry-run"]) == 0


def test_one_of_several_must_be_named(gguf_hub: Hub, ggufs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    gguf_hub.digests["step-q4.gguf"] = gguf_hub.digests[PARTS[0]]
    shutil.copy(ggufs / PARTS[0], ggufs / "step-q4.gguf")
    try:
        assert main(["inspect", ADDRESS]) == 1
        error = said(capfd)
        assert f"{ADDRESS} holds 2 GGUFs: {PARTS[0]}, step-q4.gguf" in error
        assert f"such as {ADDRESS}/{PARTS[0]}" in error
        assert main(["inspect", f"{ADDRESS}/step-q8.gguf"]) == 1
        assert f"the repository has no such GGUF; it holds {PARTS[0]}, step-q4.gguf" in said(capfd)
    finally:
        (ggufs / "step-q4.gguf").unlink()


def test_a_part_that_is_not_there_is_named(gguf_hub: Hub, capfd: pytest.CaptureFixture[str]) -> None:
    del gguf_hub.digests[PARTS[1]]
    assert main(["inspect", f"{ADDRESS}/BF16"]) == 1
    assert f"{ADDRESS}/{PARTS[1]} is missing" in said(capfd)


def test_a_gguf_is_not_converted(gguf_hub: Hub, out: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", f"{ADDRESS}/BF16", str(out / "x.gguf")]) == 1
    assert f"stepgguf quantize {ADDRESS}/BF16" in said(capfd)
    assert main(["convert", ADDRESS, str(out / "x.gguf")]) == 1
    assert f"stepgguf quantize {ADDRESS}" in said(capfd)


def test_a_header_is_read_by_as_much_as_it_has(gguf_hub: Hub, ggufs: Path) -> None:
    with open_source(Path(ADDRESS)):
        assert gguf_hub.range_bytes < 3 * 2**20 + 2**18
    local, asked = gguf_header.read(ggufs / PARTS[0]), []

    def read_at(into: bytearray, offset: int) -> None:
        asked.append(offset)
        into[:] = data[offset : offset + len(into)]

    text = gguf_header.Key.of("long", "x" * 5 * 2**20, gguf_header.V.STRING)
    data = gguf_header.encode([*local.keys.values(), text], [])
    header = gguf_header.read_by_parts(Path("x.gguf"), len(data), read_at)
    assert header.get("long") == "x" * 5 * 2**20
    assert asked == [0, 2**20, 2**22]
