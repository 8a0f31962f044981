"""Calibrated conversions in parts, for tests: the exact pass, the tokens' weights, the codes, the file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from stepgguf.calibration.conversion import CalibratedUnits, calibrate_units
from stepgguf.calibration.token_weights import TokenWeights, read_token_weights
from stepgguf.convert import MtpMode, pipeline
from stepgguf.convert.plan import Options
from stepgguf.convert.planner import plan_source
from stepgguf.convert.sources.full_hparams import full_hparams
from stepgguf.convert.sources.opening import open_source
from stepgguf.convert.sources.source import TensorSource
from stepgguf.convert.writer import Writer
from stepgguf.model.names import TensorName
from stepgguf.quants.recipe_files import load_recipe
from stepgguf.reference.backward import BackwardStream, GradientObserver
from stepgguf.reference.stream import LayerStream
from stepgguf.reference.token_rows import GUARD, PADDING, TokenRows
from stepgguf.reference.weights import WeightReader
from tests.generate import Shape, write_checkpoint

# A dense layer and two with experts, of whom one sees no token and one hardly any (checkpoint).
SHAPE = Shape(n_layer=3, n_dense=1, n_expert=4, n_mtp=1, dense=256, heads=(4, 4))
ROW, N_ROWS = 48, 9


def checkpoint(folder: Path, shape: Shape = SHAPE) -> Path:
    path = write_checkpoint(folder / "model", shape, seed=1)
    for layer, expert, bias in ((1, 3, -10.0), (2, 1, -0.4)):
        for shard in path.glob("*.safetensors"):
            tensors = load_file(shard)
            if (name := f"model.layers.{layer}.moe.router_bias") in tensors:
                tensors[name][expert] = bias
                save_file(tensors, shard, {"format": "pt"})
    return path


def rows(n: int = N_ROWS, seed: int = 0) -> TokenRows:
    """Rows of tokens; the second holds two documents and padding, the third guard tokens and padding."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(3, 700, (n, ROW)).astype(np.int32)
    documents = np.zeros((n, ROW), np.int32)
    documents[1, 20:35], documents[1, 35:] = 1, PADDING
    documents[2:3, :40], documents[2:3, 40:] = GUARD, PADDING
    return TokenRows(tokens, documents)


@dataclass(frozen=True)
class ExactPasses:
    """A stream that has run with its inputs kept, and the gradients that went back through it."""

    source: TensorSource
    exact: LayerStream
    backward: BackwardStream

    @property
    def at_embedding(self) -> NDArray[np.float32]:
        return self.backward.folder.states(0)

    def weights_of(self, name: TensorName) -> NDArray[np.float32]:
        return read_token_weights(self.backward, name)


@contextmanager
def exact_passes(
    path: Path, text: TokenRows, folder: Path, observers: Sequence[GradientObserver] = ()
) -> Iterator[ExactPasses]:
    with open_source(path) as source:
        reader = WeightReader(source, full_hparams(source).without_mtp(), torch.device("cpu"))
        exact = LayerStream(reader, text, folder / "exact", keep_inputs=True)
        exact.run_trunk()
        weights = TokenWeights(text.text.size, reader.hp.vocab_size)
        backward = BackwardStream(exact, observers=[weights, *observers])
        backward.run()
        yield ExactPasses(source, exact, backward)


def open_writer(source: TensorSource, dest: Path, type_name: str, mtp: MtpMode = "include") -> Writer:
    plan = plan_source(source, dest, Options(load_recipe(type_name), mtp=mtp, name="x", calibration="text"))
    return Writer(plan, source.identity())


def convert(path: Path, text: TokenRows, dest: Path, type_name: str, *, n_threads: int = 1) -> NDArray[np.float32]:
    """Make a calibrated file; gives the quantized stream's last states, which the pass leaves."""
    with exact_passes(path, text, dest.parent) as passes, open_writer(passes.source, dest, type_name) as writer:
        return run_codes(passes, writer, n_threads=n_threads)


def run_codes(
    passes: ExactPasses, writer: Writer, units: CalibratedUnits | None = None, *, n_threads: int = 1
) -> NDArray[np.float32]:
    """The codes, then the rest of the file."""
    units = units or CalibratedUnits(writer, passes.exact.hp.n_layer)
    calibrate_units(units, writer, passes.exact, passes.weights_of, passes.at_embedding, n_threads=n_threads)
    states = last_states(passes.exact)
    assert units.are_finished
    pipeline.make_files(passes.source, writer)
    return states


def last_states(exact: LayerStream) -> NDArray[np.float32]:
    """What leaves the quantized stream, when the pass is done."""
    shape, n = exact.folder.states(exact.hp.n_layer).shape, exact.hp.n_layer
    return np.fromfile(exact.folder.path / "quantized" / f"states-{n:03d}", np.float32).reshape(shape)


def states_of_file(path: Path, text: TokenRows, folder: Path) -> NDArray[np.float32]:
    """The last states of a file's model, by a stream of its own."""
    with open_source(path) as source:
        hp = full_hparams(source).without_mtp()
        stream = LayerStream(WeightReader(source, hp, torch.device("cpu")), text, folder)
        stream.run_trunk()
        return np.array(stream.folder.states(hp.n_layer))
