"""One pass gives the bytes of llama-quantize: every type, every tensor, from a checkpoint with 288 experts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from stepgguf.cli.main import main
from stepgguf.files import gguf_header
from tests.generate import Shape, write_checkpoint
from tests.oracle import llama_quantize

pytestmark = pytest.mark.slow

# One mixture of each family with 288 experts, where ggml's encoders take half a minute. The other types differ from one
# of these in the block's encoder alone, so that they get by with the experts of a small file.
TYPES_288 = ["Q8_0", "Q4_K_M", "IQ4_XS", "MXFP4_MOE"]
TYPES = [
    "F32", "F16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S",
    "Q5_K_M", "Q6_K", "IQ4_NL", "IQ3_S", "IQ3_M", "TQ1_0", "TQ2_0",
]  # fmt: skip


def same_tensors(a: Path, b: Path) -> None:
    """Same names, shapes, types and offsets, and the same data section, padding included."""
    first, second = gguf_header.read(a), gguf_header.read(b)
    assert first.tensors == second.tensors
    data = [np.memmap(h.path, np.uint8, "r", h.data_start) for h in (first, second)]
    assert len(data[0]) == len(data[1])
    assert np.array_equal(data[0], data[1])


@pytest.fixture(scope="module")
def experts_288(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Three dense layers, a sliding and a full layer with 288 experts; as a checkpoint and as its BF16 GGUF."""
    folder = tmp_path_factory.mktemp("288")
    path = write_checkpoint(folder / "288", Shape(n_layer=5, n_dense=3, n_expert=288, n_used=8))
    assert main(["convert", str(path), str(folder / "bf16.gguf"), "--type", "BF16", "--quiet"]) == 0
    return path, folder / "bf16.gguf"


@pytest.mark.parametrize("name", TYPES_288)
def test_convert_gives_llama_quantizes_bytes(name: str, experts_288: tuple[Path, Path], tmp_path: Path) -> None:
    checkpoint, bf16 = experts_288
    assert main(["convert", str(checkpoint), str(tmp_path / "ours.gguf"), "--type", name, "--quiet"]) == 0
    llama_quantize(bf16, tmp_path / "theirs.gguf", name)
    same_tensors(tmp_path / "ours.gguf", tmp_path / "theirs.gguf")


@pytest.fixture(scope="module")
def small_trunk(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trunk") / "bf16.gguf"
    assert main(["convert", str(small), str(path), "--type", "BF16", "--mtp", "drop", "--quiet"]) == 0
    return path


@pytest.mark.parametrize("name", TYPES)
def test_quantize_gives_llama_quantizes_bytes(name: str, small_trunk: Path, tmp_path: Path) -> None:
    assert main(["quantize", str(small_trunk), str(tmp_path / "ours.gguf"), "--type", name, "--quiet"]) == 0
    llama_quantize(small_trunk, tmp_path / "theirs.gguf", name)
    same_tensors(tmp_path / "ours.gguf", tmp_path / "theirs.gguf")


@pytest.mark.parametrize("source", ["F32", "F16", "Q8_0", "Q5_K_M"])
def test_quantize_from_other_types(source: str, small: Path, tmp_path: Path) -> None:
    start = tmp_path / "source.gguf"
    assert main(["convert", str(small), str(start), "--type", source, "--mtp", "drop", "--quiet"]) == 0
    options = ["--allow-requantize"] if source.startswith("Q") else []
    assert main(["quantize", str(start), str(tmp_path / "ours.gguf"), "--type", "Q4_K_S", "--quiet", *options]) == 0
    llama_quantize(start, tmp_path / "theirs.gguf", "Q4_K_S", requantize=True)
    same_tensors(tmp_path / "ours.gguf", tmp_path / "theirs.gguf")


def test_requantizing_is_refused_unless_asked_for(
    small: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    start = tmp_path / "q8.gguf"
    assert main(["convert", str(small), str(start), "--type", "Q8_0", "--quiet"]) == 0
    assert main(["quantize", str(start), str(tmp_path / "out.gguf"), "--type", "Q4_K_S", "--quiet"]) == 1
    assert "already Q8_0" in capfd.readouterr().err
    assert not list(tmp_path.glob("out.gguf*"))


def test_quantize_reads_split_files(small_trunk: Path, small: Path, tmp_path: Path) -> None:
    split = tmp_path / "split.gguf"
    main(["convert", str(small), str(split), "--type", "BF16", "--mtp", "drop", "--split-max-size", "3M", "--quiet"])
    parts = sorted(tmp_path.glob("split-*.gguf"))
    assert len(parts) > 3
    for i, (source, out) in enumerate(((parts[2], "a.gguf"), (small_trunk, "b.gguf"))):
        assert main(["quantize", str(source), str(tmp_path / out), "--type", "Q5_K_S", "--quiet"]) == 0, i
    same_tensors(tmp_path / "a.gguf", tmp_path / "b.gguf")


@pytest.mark.parametrize("options", [["--threads", "1"], ["--memory", "1MiB"], ["--threads", "7"]])
def test_threads_and_memory_do_not_change_a_byte(small: Path, tmp_path: Path, options: list[str]) -> None:
    for name, more in (("a.gguf", options), ("b.gguf", [])):
        assert main(["convert", str(small), str(tmp_path / name), "-t", "Q4_K_M", "--name", "x", "-q", *more]) == 0
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
