"""The collected importance matrix against what llama.cpp computes with, read out of its graph as its imatrix tool does.

llama.cpp calls back for each tensor of its graph (cb_eval). The sums are made here from the inputs of every MUL_MAT and
MUL_MAT_ID with a weight "blk.…" or "output.weight" (tools/imatrix/imatrix.cpp, collect_imatrix).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stepgguf.cli.main import main
from stepgguf.convert.sources.checkpoint import Checkpoint
from stepgguf.quants import ggml
from stepgguf.quants.imatrix import Imatrix, read_imatrix, write_imatrix
from stepgguf.reference.imatrix import Activations, collect_imatrix
from stepgguf.reference.load import load_reference
from stepgguf.reference.model import Step35
from tests.generate import Shape, write_checkpoint

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
        self.squares: dict[str, NDArray[np.float64]] = {}  # of what comes out: mean over channels, summed over tokens
        self.residual: dict[int, list[NDArray[np.float32]]] = {}
        self.weights: dict[int, NDArray[np.float32]] = {}
        self.gates: dict[int, list[tuple[NDArray[np.int32], NDArray[np.float32]]]] = {}

    def on_node(self, address: int, ask: bool, _: object) -> bool:
        node = Node.from_address(address)
        op, name = self.op_name(node.op), node.name.decode()
        if op in (b"MUL_MAT", b"MUL_MAT_ID"):
            weight = node.src[0].contents.name.decode()
            if not weight.startswith(("blk.", "output.weight")):
                return not ask
            if not ask:
                self.on_product(weight, node, values(node.src[1].contents))
        elif op == b"ADD" and name.startswith(("attn_norm_in-", "h_nextn")):
            if not ask:  # what leaves layer N has its last name from where it goes
                layer = int(name.partition("-")[2] or N_LAYER) - 1
                self.residual.setdefault(layer, []).append(values(node))
        elif name.startswith("ffn_moe_weights_scaled-"):
            if not ask:
                self.weights[int(name.partition("-")[2])] = values(node)
        else:
            return not ask
        return True

    def on_product(self, weight: str, node: Node, x: NDArray[np.float32]) -> None:
        """x is [1, 1, tokens, columns]; in MUL_MAT_ID [1, tokens, used or 1, columns] and ids [1, 1, tokens, used]."""
        routed = self.op_name(node.op) == b"MUL_MAT_ID"
        n = int(node.src[0].contents.ne[2])
        y = np.square(values(node), dtype=np.float64).mean(-1)
        if routed:
            ids = values(node.src[2].contents, np.int32)[0, 0]
            x = np.broadcast_to(x[0], (*ids.shape, x.shape[-1]))
            if "ffn_down_exps" in weight:
                layer = int(weight.split(".")[1])
                self.gates.setdefault(layer, []).append((ids.ravel(), self.weights[layer].ravel()))
        else:
            ids = np.zeros(x.shape[-2], np.int32)
        x = np.square(x.reshape(ids.size, -1), dtype=np.float64)
        np.add.at(self.sums.setdefault(weight, np.zeros((n, x.shape[-1]))), ids.ravel(), x)
        np.add.at(self.counts.setdefault(weight, np.zeros(n, np.int64)), ids.ravel(), 1)
        np.add.at(self.squares.setdefault(weight, np.zeros(n)), ids.ravel(), y.ravel())


def llama_collect(path: Path, batches: Iterable[Tensor]) -> LlamaCollector:
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
        for row in torch.cat(list(batches)):
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
def model(checkpoint: Path) -> Step35:
    with Checkpoint(checkpoint) as opened:
        return load_reference(opened)


@pytest.fixture(scope="module")
def batches() -> list[Tensor]:
    """Two batches of different shape."""
    rng = torch.Generator().manual_seed(0)
    return [torch.randint(3, 700, (2, 80), generator=rng), torch.randint(3, 700, (1, 80), generator=rng)]


@pytest.fixture(scope="module")
def collected(model: Step35, batches: list[Tensor]) -> tuple[Imatrix, Activations]:
    return collect_imatrix(model, batches)


@pytest.fixture(scope="module")
def theirs(checkpoint: Path, batches: list[Tensor], tmp_path_factory: pytest.TempPathFactory) -> LlamaCollector:
    path = tmp_path_factory.mktemp("imatrix") / "F32.gguf"
    assert main(["convert", str(checkpoint), str(path), "--type", "F32", "--quiet"]) == 0
    return llama_collect(path, batches)


def is_mtp(name: str) -> bool:
    return name.startswith(("blk.5.", "blk.6."))


def test_it_has_every_tensor_that_llama_cpp_multiplies_but_the_router(
    collected: tuple[Imatrix, Activations], theirs: LlamaCollector
) -> None:
    trunk = {name for name in collected[0].entries if not is_mtp(name)}
    assert trunk == {name for name in theirs.sums if not name.endswith("ffn_gate_inp.weight")}


def test_experts_count_the_tokens_that_llama_cpp_routes_to_them(
    collected: tuple[Imatrix, Activations], theirs: LlamaCollector
) -> None:
    counts = {name: entry.counts.tolist() for name, entry in collected[0].entries.items() if not is_mtp(name)}
    assert counts == {name: theirs.counts[name].tolist() for name in counts}
    assert len(set(counts["blk.4.ffn_down_exps.weight"])) > 1


def test_sums_are_those_of_llama_cpps_activations(
    collected: tuple[Imatrix, Activations], theirs: LlamaCollector
) -> None:
    for name, entry in collected[0].entries.items():
        if not is_mtp(name):
            error = np.abs(entry.sums - theirs.sums[name]).max(axis=1)
            assert (error <= LIMIT * theirs.sums[name].mean(axis=1)).all(), name


def test_outputs_and_residual_are_as_large_as_llama_cpps(
    collected: tuple[Imatrix, Activations], theirs: LlamaCollector
) -> None:
    activations = collected[1]
    for name, outputs in activations.outputs.items():
        if not is_mtp(name):
            expected = theirs.squares[name] / np.maximum(theirs.counts[name], 1)
            np.testing.assert_allclose(outputs, expected, rtol=LIMIT, err_msg=name)
    for layer, parts in theirs.residual.items():
        expected = np.square(np.concatenate([part.ravel() for part in parts]), dtype=np.float64).mean()
        assert activations.residual[layer] == pytest.approx(expected, rel=LIMIT)
    assert sorted(theirs.residual) == [0, 1, 2, 3, 4]


def test_gates_are_the_weights_that_llama_cpps_router_gives(
    collected: tuple[Imatrix, Activations], theirs: LlamaCollector
) -> None:
    activations = collected[1]
    assert sorted(activations.gates) == sorted(theirs.gates) == [2, 3, 4]
    for layer, parts in theirs.gates.items():
        ids, weights = (np.concatenate(column) for column in zip(*parts, strict=True))
        for expert in range(12):
            mine = weights[ids == expert].astype(np.float64)
            assert activations.gates[layer][expert] == pytest.approx(mine.mean(), rel=LIMIT)
            assert activations.gate_squares[layer][expert] == pytest.approx(np.square(mine).mean(), rel=LIMIT)


@pytest.mark.slow
def test_mtp_sums_are_those_of_the_linear_layers_inputs(
    model: Step35, batches: list[Tensor], collected: tuple[Imatrix, Activations]
) -> None:
    """No calibration tool of llama.cpp runs the MTP blocks; torch's own hooks stand in for it."""
    seen: dict[str, list[Tensor]] = {}
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, []).append(args[0]))
        for name, module in linears
    ]
    with torch.no_grad():
        for tokens in batches:
            model.mtp(tokens, model.hidden(tokens))
    for hook in hooks:
        hook.remove()
    entries = collected[0].entries
    for source, name in (
        ("eh_proj", "nextn.eh_proj"),
        ("self_attn.o_proj", "attn_output"),
        ("mlp.down_proj", "ffn_down"),
        ("transformer.shared_head.output", "nextn.shared_head_head"),
    ):
        for layer in (5, 6):
            inputs = torch.cat([x.flatten(0, 1) for x in seen[f"model.layers.{layer}.{source}"]]).double()
            entry = entries[f"blk.{layer}.{name}.weight"]
            assert entry.counts.tolist() == [240]
            np.testing.assert_allclose(entry.sums[0], inputs.square().sum(0), rtol=1e-6)  # float64 to float32
    assert len([name for name in entries if is_mtp(name)]) == 2 * 10


def test_an_expert_without_tokens_has_zeros(model: Step35) -> None:
    found, activations = collect_imatrix(model, [torch.tensor([[5]])])
    entry = found.entries["blk.2.ffn_up_exps.weight"]
    assert sorted(entry.counts.tolist()) == [0.0] * 9 + [1.0] * 3
    assert (entry.sums.any(axis=1) == (entry.counts > 0)).all()
    assert (activations.outputs["blk.2.ffn_up_exps.weight"] > 0).tolist() == (entry.counts > 0).tolist()
    assert (activations.gates[2] > 0).tolist() == (entry.counts > 0).tolist()


def test_it_is_written_and_read_back(collected: tuple[Imatrix, Activations], tmp_path: Path) -> None:
    write_imatrix(collected[0], tmp_path / "imatrix.gguf")
    back = read_imatrix(tmp_path / "imatrix.gguf")
    assert (back.chunk_count, back.chunk_size) == (3, 80)
    for name, entry in collected[0].entries.items():
        assert np.array_equal(back.entries[name].sums, entry.sums)
        assert np.array_equal(back.entries[name].counts, entry.counts)
