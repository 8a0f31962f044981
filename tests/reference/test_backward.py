"""The pass backwards through a layer stream, against torch's autograd through the whole resident model."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import Tensor
from torch.overrides import TorchFunctionMode

from stepgguf.convert.sources.checkpoint import Checkpoint
from stepgguf.model.names import TensorName
from stepgguf.model.tensors import tensor_specs
from stepgguf.reference import backward, stream
from stepgguf.reference.backward import BackwardStream, draw_labels
from stepgguf.reference.load import load_reference
from stepgguf.reference.model import DecoderLayer, Step35
from stepgguf.reference.stream import LayerProgress, LayerStream, Progress
from stepgguf.reference.token_rows import PADDING, TokenRows
from stepgguf.reference.weights import WeightReader
from tests.generate import Shape, write_checkpoint

# Small, because a clamp's gradient is no continuous function: of many hidden units, one is so close to it that float
# noise decides. Of these, none was in twelve seeds.
SHAPE = Shape(n_expert=12, n_used=3, n_mtp=1, hidden=64, dense=64, expert=32, head_dim=16)
# Of a product's largest gradient. Two float32 passes: at most 2.3e-6 measured over twelve seeds.
LIMIT = 2e-5
SEED = 3
EMBEDDED = "token_embd.weight"

# (product, expert) -> its gradients [n_places, rows], zero where it saw no token.
Gradients = Mapping[tuple[str, int], Tensor]


class Recorder:
    """An observer that keeps every gradient, and every input beside it."""

    name = "recorder"
    settings: Mapping[str, object] = {}

    def __init__(self, n_places: int) -> None:
        self._n_places, self._embedded, self._taken = n_places, list[Tensor](), set[tuple[str, int]]()
        self.gradients: dict[tuple[str, int], Tensor] = {}
        self.inputs: dict[tuple[str, int], Tensor] = {}

    def add_product(self, name: TensorName, expert: int, places: NDArray[np.int64], x: Tensor, g: Tensor) -> None:
        for kept, values in ((self.gradients, g), (self.inputs, x)):
            kept.setdefault((name, expert), torch.zeros(self._n_places, values.shape[1]))[places] += values

    def add_embedding(self, tokens: NDArray[np.int32], g: Tensor) -> None:
        self._embedded.append(g)
        self.gradients[EMBEDDED, 0] = torch.cat(self._embedded)

    def take(self) -> dict[str, NDArray[np.generic]]:
        new = self.gradients.keys() - self._taken
        self._taken |= new
        return {f"{name} {expert}": self.gradients[name, expert].numpy() for name, expert in new}


class ResidentRecorder(TorchFunctionMode):
    """The same through the resident model: products are known by the addresses of their weights."""

    def __init__(self, model: Step35) -> None:
        super().__init__()
        self.gradients: dict[tuple[str, int], Tensor] = {}
        self.inputs: dict[tuple[str, int], Tensor] = {}
        self._ids: dict[int | None, Tensor] = {}
        parameters = dict(model.named_parameters())
        self._products: dict[int, tuple[TensorName, int]] = {}
        for spec in tensor_specs(model.hp):
            weight = parameters[spec.source]
            for expert, matrix in enumerate(weight if weight.dim() == 3 else [weight]):
                self._products[matrix.data_ptr()] = spec.name, expert
        for layer in model.model.layers:
            assert isinstance(layer, DecoderLayer)
            if layer.spec.is_moe:
                layer.moe.register_forward_pre_hook(lambda moe, args, i=layer.spec.index: self._route(i, moe, args[0]))

    def _route(self, layer: int, moe: torch.nn.Module, x: Tensor) -> None:
        with torch.no_grad():
            self._ids[layer] = moe.route(x.flatten(0, -2))[0]

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        y = func(*args, **(kwargs or {}))
        if func is F.linear and (found := self._products.get(args[1].data_ptr())) and y.requires_grad:
            name, expert = found
            x = args[0].detach().flatten(0, -2)
            places = (self._ids[name.layer] == expert).any(-1) if name.is_expert else slice(None)

            def keep(g: Tensor) -> None:
                for kept, values in ((self.gradients, g.flatten(0, -2)), (self.inputs, x)):
                    kept[found] = torch.zeros(
                        len(self._ids[name.layer]) if name.is_expert else len(x), values.shape[-1]
                    )
                    kept[found][places] = values

            y.register_hook(keep)
        return y


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve experts, and clamps in its last two layers that bite."""
    return write_checkpoint(tmp_path_factory.mktemp("backward") / "model", SHAPE, seed=1)


def rows() -> TokenRows:
    """Four rows of 70 tokens, longer than the window: one document, two, one that padding follows, padding first."""
    tokens = np.random.default_rng(5).integers(3, 700, (4, 70)).astype(np.int32)
    documents = np.zeros_like(tokens)
    documents[1, 40:] = 1
    documents[2, 55:] = PADDING
    documents[3, :20], documents[3, 60:] = PADDING, 1
    return TokenRows(tokens, documents)


@contextmanager
def streamed(checkpoint: Path, folder: Path) -> Iterator[LayerStream]:
    with Checkpoint(checkpoint) as source:
        reader = WeightReader(source, source.hparams, torch.device("cpu"))
        opened = LayerStream(reader, rows(), folder, keep_inputs=True)
        opened.run_trunk()
        yield opened


def run_backward(checkpoint: Path, folder: Path, progress: Progress = lambda done: None) -> Recorder:
    recorder = Recorder(rows().text.size)
    with streamed(checkpoint, folder) as stream:
        BackwardStream(stream, seed=SEED, observers=[recorder], progress=progress).run()
    return recorder


def kill_at(layer: int) -> Progress:
    """Ends this process in the middle of a layer, as a power cut would."""

    def kill(done: LayerProgress) -> None:
        if done.layer == layer:
            os.kill(os.getpid(), signal.SIGKILL)

    return kill


def resident(checkpoint: Path) -> ResidentRecorder:
    """By torch's autograd; labels are drawn as the pass draws them, from the resident model's own logits."""
    with Checkpoint(checkpoint) as source:
        model = load_reference(source)
    text = rows()
    tokens, documents = torch.from_numpy(text.tokens).long(), torch.from_numpy(text.documents)
    embedded = model.model.embed_tokens(tokens).detach().requires_grad_()
    model.model.embed_tokens.forward = lambda _: embedded  # type: ignore[method-assign]
    with ResidentRecorder(model) as recorder:
        logits = model.logits(model.hidden(tokens, documents))
        predicted = torch.from_numpy(text.predicted)
        labels = draw_labels(logits.detach()[predicted].softmax(-1), predicted.nonzero()[:, 0].numpy(), SEED)
        F.cross_entropy(logits[predicted], labels, reduction="sum").backward()  # type: ignore[no-untyped-call]
    assert embedded.grad is not None
    recorder.gradients[EMBEDDED, 0] = embedded.grad[torch.from_numpy(text.text)]
    return recorder


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("chunk", [4096, 70])
def test_gradients_at_every_product_are_those_of_autograd(
    chunk: int, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, size in ((backward, "CHUNK_TOKENS"), (backward, "HEAD_TOKENS"), (stream, "CHUNK_TOKENS")):
        monkeypatch.setattr(module, size, chunk)
    ours, theirs = run_backward(checkpoint, tmp_path), resident(checkpoint)
    with Checkpoint(checkpoint) as source:
        trunk = {spec.name for spec in source.specs if spec.is_quantizable and not spec.is_mtp}
    assert {name for name, _ in ours.gradients} == trunk
    assert len(ours.gradients) > len(trunk) + 3 * 3 * 9  # more than nine of twelve experts in each of three layers
    for key, got in ours.gradients.items():
        assert relative_error(got, theirs.gradients[key]) < LIMIT, key
    for key, got in ours.inputs.items():
        seen = got.any(-1)
        assert relative_error(got[seen], theirs.inputs[key][seen]) < LIMIT, key
    cut = ours.gradients["blk.4.ffn_up_exps.weight", 0]
    assert 0.05 < float((cut[cut.any(-1)] == 0).float().mean()) < 0.95  # a clamp lets no gradient through


@pytest.mark.slow
def test_a_pass_that_was_killed_goes_on_and_ends_with_the_same_bytes(checkpoint: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_backward(checkpoint, whole)
    code = (
        "import sys; from pathlib import Path; from tests.reference.test_backward import kill_at, run_backward; "
        "run_backward(Path(sys.argv[1]), Path(sys.argv[2]), kill_at(2))"
    )
    ended = subprocess.run([sys.executable, "-c", code, checkpoint, killed], check=False)
    assert ended.returncode == -signal.SIGKILL
    left = {file.name for file in (killed / "gradients").iterdir()}
    assert {"states-003", "scratch-states-002"} <= left
    resumed = run_backward(checkpoint, killed)
    assert resumed.gradients.keys().isdisjoint({("output.weight", 0), ("blk.3.attn_q.weight", 0)})
    assert contents(killed / "gradients") == contents(whole / "gradients")


def contents(folder: Path) -> dict[str, bytes]:
    """Files by name; of archives, which carry times, their arrays."""
    result = {}
    for file in folder.iterdir():
        if file.suffix == ".npz":
            with np.load(file) as arrays:
                result |= {f"{file.name} {key}": array.tobytes() for key, array in arrays.items()}
        else:
            result[file.name] = file.read_bytes()
    return result


@pytest.mark.slow
def test_another_seed_begins_anew_and_the_same_one_has_nothing_left_to_do(checkpoint: Path, tmp_path: Path) -> None:
    first = run_backward(checkpoint, tmp_path)
    again = run_backward(checkpoint, tmp_path)
    assert first.gradients
    assert not again.gradients
    with streamed(checkpoint, tmp_path) as opened:
        other = Recorder(rows().text.size)
        BackwardStream(opened, seed=SEED + 1, observers=[other]).run()
    assert other.gradients.keys() == first.gradients.keys()
    assert not torch.equal(other.gradients["output.weight", 0], first.gradients["output.weight", 0])


def test_labels_are_drawn_as_often_as_they_are_probable() -> None:
    p, n = torch.tensor([0.5, 0.3, 0.15, 0.05]), 20_000
    labels = draw_labels(p.expand(n, -1), np.arange(n) // 100, 0)
    counts = torch.bincount(labels, minlength=4)
    assert ((counts - n * p).abs() < 5 * (n * p * (1 - p)).sqrt()).all()  # five standard errors


def test_labels_of_a_row_do_not_depend_on_the_rows_beside_it() -> None:
    p = torch.rand(30, 50, generator=torch.Generator().manual_seed(0))
    places = np.repeat([4, 5, 9], 10)
    together = draw_labels(p, places, 1)
    alone = [draw_labels(p[places == row], places[places == row], 1) for row in (4, 5, 9)]
    assert torch.equal(together, torch.cat(alone))
    assert not torch.equal(together, draw_labels(p, places, 2))
