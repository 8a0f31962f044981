"""What making a unit costs: each stored byte is read once, and memory is what is promised."""

from __future__ import annotations

import gc
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType

from stepgguf.cli.main import main
from stepgguf.convert.pipeline import RowMaker, count_workers
from stepgguf.convert.plan import Copy, Options, PlannedTensor, unit_rows
from stepgguf.convert.planner import plan_source
from stepgguf.convert.sources.checkpoint import Checkpoint
from stepgguf.convert.sources.gguf_file import GGUFSource
from stepgguf.convert.sources.source import TensorSource
from stepgguf.quants.recipe_files import load_recipe
from tests.generate import Shape, write_checkpoint

pytestmark = pytest.mark.slow

SHAPE = Shape(n_layer=2, n_dense=1, n_expert=3, dense=4096, expert=4096)  # matrices of a million values
STORED = ("bf16", "fp8", "F32", "F16", "Q8_0", "Q4_K")
MADE = ("F32", "F16", "BF16", "Q8_0", "Q4_K")
OBJECTS = 64 * 1024  # Python's own: descriptors, headers of arrays


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, TensorSource]]:
    folder = tmp_path_factory.mktemp("pipeline")
    bf16 = write_checkpoint(folder / "bf16", SHAPE)
    opened: dict[str, Checkpoint | GGUFSource] = {"bf16": Checkpoint(bf16)}
    opened["fp8"] = Checkpoint(write_checkpoint(folder / "fp8", SHAPE, fp8=True))
    for name in STORED[2:]:
        path = folder / f"{name}.gguf"
        (folder / "one.toml").write_text(f'default = "{name}"\n')
        assert main(["convert", str(bf16), str(path), "-t", str(folder / "one.toml"), "-q"]) == 0
        opened[name] = GGUFSource(path)
    yield opened  # type: ignore[misc]
    for source in opened.values():
        source.close()


def units(source: TensorSource, made: str) -> Iterator[tuple[PlannedTensor, int, int]]:
    """The rows of a unit of a matrix of each shape, made as this type."""
    plan = plan_source(source, Path("x.gguf"), Options(load_recipe("F32"), allow_requantize=True))  # type: ignore[arg-type]
    shapes = {tensor.shape: tensor for tensor in plan.tensors if tensor.source is not None}
    for tensor in shapes.values():
        if tensor.name.startswith("blk.") and tensor.n_values >= 2**20:
            tensor = tensor.as_type(GGMLQuantizationType[made], None)
            yield tensor, *next(unit_rows(tensor))


@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize("stored", STORED)
def test_a_unit_takes_no_more_memory_than_is_promised(stored: str, made: str, sources: dict[str, TensorSource]) -> None:
    source = sources[stored]
    maker = RowMaker(source)
    for tensor, start, stop in units(source, made):
        maker.make_rows(tensor, start, stop)  # kernels are loaded, tables are made
        gc.collect()
        tracemalloc.start()
        out, _ = maker.make_rows(tensor, start, stop)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        promised = tensor.unit_memory
        assert out.nbytes <= peak <= promised + OBJECTS, tensor
        assert promised < 3 * (out.nbytes + 4 * out.shape[0] * tensor.shape[-1]), "a promise that says something"


def read_bytes() -> int:
    """What this process has read so far, from the page cache too."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("rchar:")).split()[1])


@pytest.mark.skipif(sys.platform != "linux", reason="counts by /proc")
@pytest.mark.parametrize("made", ["BF16", "F32", "Q8_0"])
@pytest.mark.parametrize("stored", ["bf16", "F32", "Q8_0"])
def test_each_stored_byte_is_read_once(stored: str, made: str, sources: dict[str, TensorSource]) -> None:
    source = sources[stored]
    maker = RowMaker(source)
    for tensor, start, stop in units(source, made):
        assert tensor.source is not None
        maker.make_rows(tensor, start, stop)
        n_stored = source.raw(tensor.source, start, stop).nbytes
        before, noise = read_bytes(), len(Path("/proc/self/io").read_bytes())
        maker.make_rows(tensor, start, stop)
        assert n_stored <= read_bytes() - before < n_stored + 4 * noise + 1024, tensor


def test_a_copy_is_a_copy_and_needs_less(sources: dict[str, TensorSource]) -> None:
    for stored, made in (("bf16", "BF16"), ("F32", "F32"), ("Q8_0", "Q8_0"), ("Q4_K", "Q4_K")):
        source = sources[stored]
        for tensor, start, stop in units(source, made):
            assert tensor.source is not None
            assert isinstance(tensor.action, Copy)
            copied = RowMaker(source).make_rows(tensor, start, stop)[0]
            assert copied.tobytes() == source.raw(tensor.source, start, stop).tobytes()
            other = tensor.as_type(GGMLQuantizationType["F16"], None)
            assert tensor.unit_memory < other.unit_memory


def test_workers_are_as_many_as_memory_holds(sources: dict[str, TensorSource]) -> None:
    source = sources["bf16"]
    tensors = [tensor for tensor, _, _ in units(source, "Q8_0")]
    largest = max(tensor.unit_memory for tensor in tensors)
    assert count_workers(tensors, 8, 5 * largest) == 5
    assert count_workers(tensors, 8, 1) == 1
    assert count_workers(tensors, 3, 100 * largest) == 3
