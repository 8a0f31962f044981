"""What a tensor's error weighs, on the generated model: energies and errors made up, weights by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from stepgguf.convert.importance import Importance
from stepgguf.convert.measure import TensorErrors
from stepgguf.convert.objective import Routing, weigh_options
from stepgguf.convert.plan import Options, PlannedTensor
from stepgguf.convert.planner import plan_source
from stepgguf.convert.sources.checkpoint import Checkpoint
from stepgguf.quants.allocate import TensorOptions
from stepgguf.quants.imatrix import Imatrix, ImatrixEntry, write_imatrix
from stepgguf.quants.recipe_files import load_recipe
from tests.generate import Shape, write_checkpoint

T = GGMLQuantizationType
ROUTING = Routing(n_expert=6, n_used=2, scale=3.0)
ERROR = 0.01
ENERGIES = {
    "token_embd.weight": 4.0,
    "blk.0.attn_output.weight": 6.0,
    "blk.0.ffn_down.weight": 30.0,
    "blk.1.attn_output.weight": 10.0,
    "blk.1.ffn_down_exps.weight": 2.0,  # of one expert: two of them with half of 3.0 each add 9
    "blk.1.ffn_down_shexp.weight": 1.0,
}


@pytest.fixture(scope="module")
def tensors(tmp_path_factory: pytest.TempPathFactory) -> list[PlannedTensor]:
    """Two layers, the first dense, of a model with six experts."""
    folder = tmp_path_factory.mktemp("objective")
    with Checkpoint(write_checkpoint(folder / "two", Shape(n_layer=2, n_dense=1))) as checkpoint:
        plan = plan_source(checkpoint, folder / "x.gguf", Options(load_recipe("Q8_0")))
    return [tensor for tensor in plan.tensors if tensor.is_quantized]


@pytest.fixture(scope="module")
def importance(tensors: list[PlannedTensor], tmp_path_factory: pytest.TempPathFactory) -> Importance:
    """Data for all tensors but the embedding, as imatrix tools write it."""
    return write_importance(tensors, tmp_path_factory.mktemp("imatrix") / "imatrix.gguf", without="token_embd")


def write_importance(tensors: list[PlannedTensor], path: Path, without: str) -> Importance:
    entries = {
        t.name: ImatrixEntry(np.ones((t.n_experts, t.shape[-1]), np.float32), np.ones(t.n_experts, np.float32))
        for t in tensors
        if t.role != without and t.role != "token_embd"
    }
    write_imatrix(Imatrix(None, ("made up",), 1, 1, entries), path)
    return Importance.read(path)


def made_up(tensors: list[PlannedTensor]) -> Mapping[str, TensorErrors]:
    return {t.name: TensorErrors(ENERGIES.get(t.name, 77.0), {T.Q4_K: ERROR, T.Q8_0: 0.0}) for t in tensors}


def weights(found: list[TensorOptions]) -> dict[str, float]:
    return {item.name.removesuffix(".weight"): item.options[0].cost / ERROR for item in found}


PRIOR = {
    "token_embd": 1.0, "blk.0.attn_output": 1 / 2, "blk.0.ffn_down": 1 / 3, "blk.1.attn_output": 1 / 4,
    "blk.1.ffn_down_exps": 0.5 / 5, "blk.1.ffn_down_shexp": 0.5 / 5,
}  # fmt: skip
MEASURED = {
    "token_embd": 1.0, "blk.0.attn_output": 6 / 10, "blk.0.ffn_down": 30 / 40, "blk.1.attn_output": 10 / 50,
    "blk.1.ffn_down_exps": 9 / 60, "blk.1.ffn_down_shexp": 1 / 60,
}  # fmt: skip


def test_without_an_imatrix_every_block_adds_as_much_as_any_other(tensors: list[PlannedTensor]) -> None:
    found = weights(weigh_options(tensors, made_up(tensors), ROUTING, None))
    assert {name: found[name] for name in PRIOR} == pytest.approx(PRIOR)


def test_with_an_imatrix_the_weight_is_the_mean_with_what_was_measured(
    tensors: list[PlannedTensor], importance: Importance
) -> None:
    found = weights(weigh_options(tensors, made_up(tensors), ROUTING, importance))
    expected = {name: math.sqrt(PRIOR[name] * MEASURED[name]) for name in PRIOR}
    assert {name: found[name] for name in expected} == pytest.approx(expected)


@pytest.mark.parametrize("given", [False, True])
def test_what_is_multiplied_into_an_output_weighs_as_the_output(
    given: bool, tensors: list[PlannedTensor], importance: Importance
) -> None:
    found = weights(weigh_options(tensors, made_up(tensors), ROUTING, importance if given else None))
    for layer in (0, 1):
        for role in ("attn_q", "attn_k", "attn_v", "attn_gate"):
            assert found[f"blk.{layer}.{role}"] == found[f"blk.{layer}.attn_output"]
    for gate in ("blk.0.ffn_gate", "blk.0.ffn_up", "blk.1.ffn_gate_exps", "blk.1.ffn_up_exps", "blk.1.ffn_up_shexp"):
        assert found[gate] == found[gate.replace("gate", "down").replace("up", "down")]
    assert found["output"] == found["token_embd"] == 1.0


def test_an_imatrix_that_lacks_a_writer_gives_no_energies(tensors: list[PlannedTensor], tmp_path: Path) -> None:
    partial = write_importance(tensors, tmp_path / "partial.gguf", without="attn_output")
    found = weights(weigh_options(tensors, made_up(tensors), ROUTING, partial))
    assert {name: found[name] for name in PRIOR} == pytest.approx(PRIOR)


def test_options_have_the_files_bytes_and_shares_say_what_a_token_reads(tensors: list[PlannedTensor]) -> None:
    found = {item.name: item for item in weigh_options(tensors, made_up(tensors), ROUTING, None)}
    assert [item.name for item in found.values()] == [tensor.name for tensor in tensors]
    # 6 experts x 256 rows x 256 columns: a block of 256 is 144 bytes as Q4_K, 8 x 34 as Q8_0.
    experts = found["blk.1.ffn_up_exps.weight"]
    assert {o.ggml_type: o.n_bytes for o in experts.options} == {T.Q4_K: 1536 * 144, T.Q8_0: 1536 * 272}
    assert experts.read_share == 2 / 6
    assert found["blk.1.ffn_up_shexp.weight"].read_share == found["output.weight"].read_share == 1.0
    assert found["token_embd.weight"].read_share == 1 / 768
