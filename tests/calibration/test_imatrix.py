"""The collected importance matrix against what llama.cpp computes with, read out of its graph as its imatrix tool does.

llama.cpp calls back for each tensor of its graph (cb_eval). The sums are made here from the inputs of every MUL_MAT and
MUL_MAT_ID with a weight "blk.…" or "output.weight" (tools/imatrix/imatrix.cpp, collect_imatrix).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stepgguf.calibration import imatrix as calibration
from stepgguf.calibration.imatrix import collect_imatrix, experts_below, growing_parts, whole_text
from stepgguf.cli.main import main
from stepgguf.convert.sources.checkpoint import Checkpoint
from stepgguf.errors import ImatrixError
from stepgguf.quants import ggml
from stepgguf.quants.imatrix import Imatrix, read_imatrix, write_imatrix
from stepgguf.reference.load import load_reference
from stepgguf.reference.stream import LayerProgress
from stepgguf.reference.token_rows import TokenRows
from stepgguf.reference.weights import WeightReader
from tests.generate import Shape, write_checkpoint

pytestmark = pytest.mark.slow
# Of the row's mean. Two float32 forward passes: at most 6e-5 measured over four seeds, in channels that few tokens
# drive; one token more or less of the 240 would be 4e-3.
LIMIT = 5e-4
N_LAYER = 5


class Node(ctypes.Structure):
    """struct ggml_tensor (ggml.h)."""


Node._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(Node) * 10),
    ("view_src", ctypes.c_void_p),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
]


def values(node: Node, kind: type = np.float32) -> NDArray[Any]:
    """A float32 or int32 tensor in numpy order, through its strides."""
    shape, strides = tuple(node.ne)[::-1], tuple(node.nb)[::-1]
    n_bytes = 4 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    block = np.frombuffer((ctypes.c_char * n_bytes).from_address(node.data), kind)
    return np.ndarray(shape, kind, block, strides=strides).copy()


class LlamaCollector:
    """Sums over the products of llama.cpp's graph, in float64."""

    def __init__(self) -> None:
        library = ctypes.CDLL(str(ggml.load_library().path))
        library.ggml_op_name.restype = ctypes.c_char_p
        self.op_name = library.ggml_op_name
        self.sums: dict[str, NDArray[np.float64]] = {}
        self.counts: dict[str, NDArray[np.int64]] = {}
        self.linear: dict[str, NDArray[np.float64]] = {}

    def on_node(self, address: int, ask: bool, _: object) -> bool:
        node = Node.from_address(address)
        if self.op_name(node.op) not in (b"MUL_MAT", b"MUL_MAT_ID"):
            return not ask
        weight = node.src[0].contents.name.decode()
        if not weight.startswith(("blk.", "output.weight")):
            return not ask
        if not ask:
            self.on_product(weight, node, values(node.src[1].contents))
        return True

    def on_product(self, weight: str, node: Node, x: NDArray[np.float32]) -> None:
        """x is [1, 1, tokens, columns]; in MUL_MAT_ID [1, tokens, used or 1, columns] and ids [1, 1, tokens, used]."""
        n = int(node.src[0].contents.ne[2])
        if self.op_name(node.op) == b"MUL_MAT_ID":
            ids = values(node.src[2].contents, np.int32)[0, 0]
            x = np.broadcast_to(x[0], (*ids.shape, x.shape[-1]))
        else:
            ids = np.zeros(x.shape[-2], np.int32)
        wide = x.reshape(ids.size, -1).astype(np.float64)
        for sums, terms in ((self.sums, wide * wide), (self.linear, wide)):
            np.add.at(sums.setdefault(weight, np.zeros((n, wide.shape[-1]))), ids.ravel(), terms)
        np.add.at(self.counts.setdefault(weight, np.zeros(n, np.int64)), ids.ravel(), 1)


def llama_collect(path: Path, rows: TokenRows) -> LlamaCollector:
    """Run llama.cpp on each sequence, with logits for every token, as the imatrix tool does."""
    found = LlamaCollector()
    callback = llama_cpp.ggml_backend_sched_eval_callback(found.on_node)
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = 512
    params.n_threads = params.n_threads_batch = 1
    params.type_k = params.type_v = 0  # float32
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it rounds more
    params.cb_eval = callback
    context = llama_cpp.llama_init_from_model(model, params)
    try:
        for row in rows.tokens:
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
            batch = llama_cpp.llama_batch_init(len(row), 0, 1)
            batch.n_tokens = len(row)
            for i, token in enumerate(row.tolist()):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, True
                batch.seq_id[i][0] = 0
            assert llama_cpp.llama_decode(context, batch) == 0
            llama_cpp.llama_batch_free(batch)
    finally:
        llama_cpp.llama_free(context)
        llama_cpp.llama_model_free(model)
    return found


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 experts of which 3 are used, clamps that bite, and MTP blocks."""
    shape = Shape(n_layer=N_LAYER, n_mtp=2, n_expert=12, n_used=3)
    return write_checkpoint(tmp_path_factory.mktemp("imatrix") / "small", shape, seed=3)


@pytest.fixture(scope="module")
def reader(checkpoint: Path) -> Iterator[WeightReader]:
    with Checkpoint(checkpoint) as opened:
        yield WeightReader(opened, opened.hparams, torch.device("cpu"))


@pytest.fixture(scope="module")
def rows() -> TokenRows:
    return TokenRows.of(np.random.default_rng(0).integers(3, 700, (3, 80)).astype(np.int32))


@pytest.fixture(scope="module")
def collected(reader: WeightReader, rows: TokenRows, tmp_path_factory: pytest.TempPathFactory) -> Imatrix:
    return collect(reader, rows, tmp_path_factory.mktemp("stream"))


@pytest.fixture(scope="module")
def theirs(checkpoint: Path, rows: TokenRows, tmp_path_factory: pytest.TempPathFactory) -> LlamaCollector:
    path = tmp_path_factory.mktemp("imatrix") / "F32.gguf"
    assert main(["convert", str(checkpoint), str(path), "--type", "F32", "--quiet"]) == 0
    return llama_collect(path, rows)


def collect(reader: WeightReader, rows: TokenRows, folder: Path) -> Imatrix:
    [found] = collect_imatrix(reader, rows, whole_text(rows), folder)
    return found


def is_mtp(name: str) -> bool:
    return name.startswith(("blk.5.", "blk.6."))


def same(a: Imatrix, b: Imatrix) -> None:
    assert a.entries.keys() == b.entries.keys()
    for name in a.entries:
        assert np.array_equal(a.entries[name].sums, b.entries[name].sums), name
        assert np.array_equal(a.entries[name].counts, b.entries[name].counts), name


def test_it_has_every_tensor_that_llama_cpp_multiplies_but_the_router(
    collected: Imatrix, theirs: LlamaCollector
) -> None:
    trunk = {name for name in collected.entries if not is_mtp(name)}
    assert trunk == {name for name in theirs.sums if not name.endswith("ffn_gate_inp.weight")}
    assert (collected.chunk_count, collected.chunk_size, collected.n_mtp) == (3, 80, 2)


def test_experts_count_the_tokens_that_llama_cpp_routes_to_them(collected: Imatrix, theirs: LlamaCollector) -> None:
    counts = {name: entry.counts.tolist() for name, entry in collected.entries.items() if not is_mtp(name)}
    assert counts == {name: theirs.counts[name].tolist() for name in counts}
    assert len(set(counts["blk.4.ffn_down_exps.weight"])) > 1


def test_sums_are_those_of_llama_cpps_activations(collected: Imatrix, theirs: LlamaCollector) -> None:
    for name, entry in collected.entries.items():
        if not is_mtp(name):
            error = np.abs(entry.sums - theirs.sums[name]).max(axis=1)
            assert (error <= LIMIT * theirs.sums[name].mean(axis=1)).all(), name
            assert entry.linear is not None
            # As large as sums of x could be: sqrt(n * sum of squares).
            scale = np.sqrt(theirs.sums[name].mean(axis=1) * theirs.counts[name])
            assert (np.abs(entry.linear - theirs.linear[name]).max(axis=1) <= LIMIT * scale).all(), name


def test_mtp_sums_are_those_of_the_linear_layers_inputs(checkpoint: Path, rows: TokenRows, collected: Imatrix) -> None:
    """llama.cpp's tool of this version does not run the MTP blocks; torch's own hooks stand in for it."""
    with Checkpoint(checkpoint) as opened:
        model = load_reference(opened)
    seen: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0].flatten(0, 1)}))
    tokens = torch.from_numpy(rows.tokens).long()
    with torch.no_grad():
        model.mtp(tokens, model.hidden(tokens))
    for source, name in (
        ("eh_proj", "nextn.eh_proj"),
        ("self_attn.o_proj", "attn_output"),
        ("mlp.down_proj", "ffn_down"),
        ("transformer.shared_head.output", "nextn.shared_head_head"),
    ):
        for layer in (5, 6):
            inputs = seen[f"model.layers.{layer}.{source}"].double()
            entry = collected.entries[f"blk.{layer}.{name}.weight"]
            assert entry.counts.tolist() == [240]
            expected = inputs.square().sum(0).numpy()
            assert (np.abs(entry.sums[0] - expected) <= LIMIT * expected.mean()).all()
    assert len([name for name in collected.entries if is_mtp(name)]) == 2 * 10


def test_padding_is_not_counted(reader: WeightReader, rows: TokenRows, collected: Imatrix, tmp_path: Path) -> None:
    """The same rows with padding behind them: nothing sees it, so the sums are the same."""
    wider = np.pad(rows.tokens, ((0, 0), (0, 7)))
    documents = np.pad(rows.documents, ((0, 0), (0, 7)), constant_values=-1)
    padded = collect(reader, TokenRows(wider, documents), tmp_path)
    for name, entry in collected.entries.items():
        assert np.array_equal(padded.entries[name].counts, entry.counts), name
        if not is_mtp(name):  # at the end of a row an MTP block reads what follows
            error = np.abs(padded.entries[name].sums - entry.sums).max(axis=1)
            assert (error <= LIMIT * entry.sums.mean(axis=1)).all(), name


def test_an_expert_without_tokens_has_zeros(reader: WeightReader, tmp_path: Path) -> None:
    entry = collect(reader, TokenRows.of(np.array([[5]], np.int32)), tmp_path).entries["blk.2.ffn_up_exps.weight"]
    assert sorted(entry.counts.tolist()) == [0.0] * 9 + [1.0] * 3
    assert (entry.sums.any(axis=1) == (entry.counts > 0)).all()


def test_it_is_written_and_read_back(collected: Imatrix, tmp_path: Path) -> None:
    write_imatrix(collected, tmp_path / "imatrix.gguf")
    back = read_imatrix(tmp_path / "imatrix.gguf")
    assert (back.chunk_count, back.chunk_size, back.n_mtp) == (3, 80, 2)
    same(back, collected)


def test_parts_grow_to_as_much_as_has_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "FIRST_PART_TOKENS", 70)
    rows = TokenRows.of(np.zeros((11, 30), np.int32))
    assert list(growing_parts(rows)) == [slice(0, 2), slice(2, 4), slice(4, 8), slice(8, 11)]
    assert list(growing_parts(rows[:2])) == [slice(0, 2)]


def test_sums_of_parts_add_up(reader: WeightReader, rows: TokenRows, collected: Imatrix, tmp_path: Path) -> None:
    first, both = collect_imatrix(reader, rows, [slice(0, 1), slice(1, 3)], tmp_path)
    assert (first.chunk_count, both.chunk_count) == (1, 3)
    for name, entry in collected.entries.items():
        assert np.array_equal(both.entries[name].counts, entry.counts)
        # Rows are multiplied in other groups: an input differs by the float32 error of its layer's largest.
        np.testing.assert_allclose(both.entries[name].sums, entry.sums, rtol=1e-5, atol=1e-6 * entry.sums.max())


def test_experts_below_a_number_of_tokens_are_named(collected: Imatrix) -> None:
    counts = collected.entries["blk.3.ffn_gate_exps.weight"].counts
    found = [(e.expert, e.tokens) for e in experts_below(collected, 60) if e.layer == 3]
    assert found == [(i, int(n)) for i, n in enumerate(counts) if n < 60]
    assert 0 < len(found) < 12
    assert experts_below(collected, 0) == []


class Stop(Exception):
    """Raised by a test where a run is to end."""


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.8, 0.95])
def test_an_interrupted_run_is_gone_on_with(
    share: float, reader: WeightReader, rows: TokenRows, collected: Imatrix, tmp_path: Path
) -> None:
    def stop(at: LayerProgress) -> None:
        if at.done >= share * at.total:
            raise Stop

    with pytest.raises(Stop):
        next(collect_imatrix(reader, rows, whole_text(rows), tmp_path, progress=stop))
    seen: list[LayerProgress] = []
    [found] = collect_imatrix(reader, rows, whole_text(rows), tmp_path, progress=seen.append)
    same(found, collected)
    assert seen[-1].done == seen[-1].total
    assert (seen[-1].earlier > 0) == (share > 0.1)  # a layer was whole


def test_a_part_that_is_done_is_not_run_again(
    reader: WeightReader, rows: TokenRows, collected: Imatrix, tmp_path: Path
) -> None:
    same(collect(reader, rows, tmp_path), collected)
    assert not [path.name for path in (tmp_path / "part-0").iterdir() if "states" in path.name]
    seen: list[LayerProgress] = []
    [found] = collect_imatrix(reader, rows, whole_text(rows), tmp_path, progress=seen.append)
    assert seen == []
    same(found, collected)


def test_inputs_that_are_no_numbers_are_named(checkpoint: Path, rows: TokenRows, tmp_path: Path) -> None:
    with Checkpoint(checkpoint) as opened:
        reader = WeightReader(opened, opened.hparams, torch.device("cpu"))
        embed = reader.embed

        def damaged(tokens: NDArray[np.int32], out: NDArray[np.float32]) -> None:
            embed(tokens, out)
            out[0, 0, 7] = np.nan

        reader.embed = damaged  # type: ignore[method-assign]
        with pytest.raises(ImatrixError, match=r"^blk\.0\.attn_gate\.weight: its inputs are not finite"):
            collect(reader, rows, tmp_path)
