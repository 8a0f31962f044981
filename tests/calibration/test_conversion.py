"""Files with calibrated codes: what the pass believed it wrote is what the file holds."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from stepgguf.calibration.code_search import CalibratedCodes
from stepgguf.calibration.conversion import CalibratedUnits
from stepgguf.cli.main import main
from stepgguf.convert.journal import RECORD_BYTES
from stepgguf.convert.sources.checkpoint import Checkpoint
from stepgguf.convert.writer import Writer
from stepgguf.errors import CorruptTensor, QuantError
from stepgguf.model.names import TensorName
from stepgguf.quants import ggml
from tests.calibration import passes
from tests.calibration.passes import SHAPE, convert, exact_passes, open_writer, run_codes, states_of_file

TYPES = ("Q2_K", "Q3_K_M", "Q4_K_S", "IQ4_XS", "IQ3_S", "Q5_1", "Q8_0", "F16")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return passes.checkpoint(tmp_path_factory.mktemp("source"))


def tensor_bytes(path: Path) -> dict[str, NDArray[np.uint8]]:
    return {tensor.name: tensor.data.view(np.uint8).reshape(-1) for tensor in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("type_name", TYPES)
def test_the_quantized_stream_is_the_finished_file_s(type_name: str, checkpoint: Path, tmp_path: Path) -> None:
    """Its states are what everything behind was chosen for: one wrong matrix, expert or row would be far off."""
    text = passes.rows()
    states = convert(checkpoint, text, tmp_path / "out.gguf", type_name)
    found = states_of_file(tmp_path / "out.gguf", text, tmp_path / "again")
    # The same weights in float32; the GGUF has RoPE's factors and norms + 1 in float32.
    here = text.text
    assert np.abs(found - states)[here].max() <= 2e-5 * np.abs(states[here]).max()


@pytest.fixture
def stock_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CalibratedCodes, "_try", lambda *arguments: iter(()))


def test_without_candidates_the_codes_are_ggml_s_with_the_moments_importance(
    checkpoint: Path, tmp_path: Path, stock_only: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: dict[tuple[str, int], list[bytes]] = {}
    encode = CalibratedUnits.encode
    library = ggml.load_library()
    assert library is not None

    def watch(self, name, expert, values, importance):  # type: ignore[no-untyped-def]
        blocks = encode(self, name, expert, values, importance)
        again = np.empty_like(blocks)
        library.quantize(self.type_of(name), values, again, importance)
        made.setdefault((name, expert), []).append(again.tobytes())
        return blocks

    monkeypatch.setattr(CalibratedUnits, "encode", watch)
    convert(checkpoint, passes.rows(), tmp_path / "out.gguf", "Q4_K_M")
    in_file = tensor_bytes(tmp_path / "out.gguf")
    names = {name for name, _ in made}
    for name in names:
        experts = sum(1 for other, _ in made if other == name)
        assert b"".join(made[name, expert][0] for expert in range(experts)) == in_file[name].tobytes()
    assert (
        len(names) == (5 + 3) + 2 * (5 + 3 + 3) + 2
    )  # attention, MLP; attention, shared expert, experts; embedding, output


def test_what_is_not_quantized_and_what_the_pass_does_not_see_is_as_without_it(
    checkpoint: Path, tmp_path: Path
) -> None:
    convert(checkpoint, passes.rows(), tmp_path / "out.gguf", "Q4_K_S")
    assert main(["convert", str(checkpoint), str(tmp_path / "stock.gguf"), "-t", "Q4_K_S", "--name", "x", "-q"]) == 0
    ours, stock = tensor_bytes(tmp_path / "out.gguf"), tensor_bytes(tmp_path / "stock.gguf")
    differ = {name for name in ours if not np.array_equal(ours[name], stock[name])}
    trunk = {name for name in ours if name.endswith("weight") and "norm" not in name and not name.startswith("blk.3.")}
    assert differ <= trunk
    assert len(differ) > 20


@pytest.mark.parametrize("type_name", ["F32", "BF16"])
def test_floats_are_copied(type_name: str, checkpoint: Path, tmp_path: Path) -> None:
    convert(checkpoint, passes.rows(), tmp_path / "out.gguf", type_name)
    assert main(["convert", str(checkpoint), str(tmp_path / "stock.gguf"), "-t", type_name, "--name", "x", "-q"]) == 0
    ours, stock = tensor_bytes(tmp_path / "out.gguf"), tensor_bytes(tmp_path / "stock.gguf")
    assert all(np.array_equal(ours[name], stock[name]) for name in stock)


def test_threads_of_the_search_change_nothing(checkpoint: Path, tmp_path: Path) -> None:
    files = []
    for n in (1, 3):
        (tmp_path / str(n)).mkdir()
        convert(checkpoint, passes.rows(), tmp_path / str(n) / "out.gguf", "Q3_K_M", n_threads=n)
        files.append((tmp_path / str(n) / "out.gguf").read_bytes())
    assert files[0] == files[1]


def test_a_value_that_is_no_number_is_named_though_no_token_comes_by(checkpoint: Path, tmp_path: Path) -> None:
    tensor = TensorName("blk.1.ffn_down_exps.weight")
    values, ones = np.ones((256, 256), np.float32), np.ones(256, np.float32)
    with Checkpoint(checkpoint) as source, open_writer(source, tmp_path / "out.gguf", "Q4_K_S") as writer:
        made = CalibratedUnits(writer, SHAPE.n_layer)
        values[5, 9] = np.nan
        with pytest.raises(CorruptTensor, match=r"down_proj\.weight: expert 2, row 5, column 9 is nan"):
            made.encode(tensor, 2, values, ones)
        values[5, 9] = 1e9
        with pytest.raises(QuantError, match=r"blk\.1\.ffn_down_exps\.weight, expert 2: the values are too large"):
            made.encode(tensor, 2, values, ones)


class InterruptedUnits(CalibratedUnits):
    """Ctrl+C after some commits."""

    def __init__(self, writer: Writer, n_layer: int, n_commits: int) -> None:
        super().__init__(writer, n_layer)
        self._left = n_commits

    def commit(self) -> None:
        super().commit()
        self._left -= 1
        if self._left == 0:
            raise KeyboardInterrupt


def test_codes_whose_journal_was_damaged_are_chosen_again(checkpoint: Path, tmp_path: Path) -> None:
    """Their states are kept, and would be gone on with: the pass must not leave stock codes behind."""
    text, dest = passes.rows(), tmp_path / "out.gguf"
    convert(checkpoint, text, dest, "Q4_K_S")
    whole = dest.read_bytes()
    dest.unlink()
    with exact_passes(checkpoint, text, tmp_path) as passed:
        with open_writer(passed.source, dest, "Q4_K_S") as writer, pytest.raises(KeyboardInterrupt):
            run_codes(passed, writer, InterruptedUnits(writer, SHAPE.n_layer, 4))
        assert (tmp_path / "exact" / "quantized" / "states-002").exists()
        journal = tmp_path / "out.gguf.journal"
        journal.write_bytes(journal.read_bytes()[: -40 * RECORD_BYTES])
        with open_writer(passed.source, dest, "Q4_K_S") as writer:
            run_codes(passed, writer)
    assert dest.read_bytes() == whole
