"""An importance matrix from the reference model: what llama.cpp's imatrix tool records, by a torch forward pass.

Quantization asks what each weight's error does to the output: the error of a product W x is weighted by E[x_j^2], one
number per input channel j. So every matrix product is watched while calibration text runs through the model:

    for each product  y = W x:   sums[tensor, expert, j] += x_j^2    counts[tensor, expert] += 1

The counting is that of llama.cpp's tool (tools/imatrix/imatrix.cpp, collect_imatrix): an expert counts only the tokens
that were routed to it, and the router's weight plays no part. Two differences: sums are made in float64, where the tool
adds float32; and the MTP blocks are there, which the tool never runs. The router is left out: it stays in float32.

A product is recognized by the address of its weight, as the tool does by the tensor's name, so the model needs no hooks
inside its experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from stepgguf.model.tensors import tensor_specs
from stepgguf.quants.imatrix import Imatrix, ImatrixEntry
from stepgguf.reference.model import DecoderLayer, MoE, Step35

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Activations:
    """How large the model's own signals are: what an error has to be compared with.

    outputs: tensor -> [n_matrix] mean y^2 of its product, over tokens and output channels; 0 where no token came.
    residual: layer -> mean x^2 of the residual stream that leaves it.
    gates, gate_squares: layer -> [n_expert] mean of the router's weight, and of its square, over the expert's tokens.
    An error e in an expert's output reaches the residual stream as weight * e, so its energy counts weight^2.
    """

    outputs: Mapping[str, Doubles]
    residual: Mapping[int, float]
    gates: Mapping[int, Doubles]
    gate_squares: Mapping[int, Doubles]


@torch.no_grad()
def collect_imatrix(model: Step35, token_batches: Iterable[Tensor]) -> tuple[Imatrix, Activations]:
    """Run calibration tokens, each batch [b, t] on its own, through the trunk, the head and the MTP blocks.

    Gives their importance matrix, and how large the model's own signals are.

    The last k + 1 positions of MTP block k see a stand-in for tokens that do not exist (Step35.mtp); they are counted.
    """
    products, signals = _Products(model), _Signals(model.hp.n_expert)
    n_sequences = n_tokens = 0
    with ExitStack() as watched:
        watched.enter_context(products)
        for layer in model.model.layers:
            assert isinstance(layer, DecoderLayer)
            watched.enter_context(layer.register_forward_hook(signals.add_layer))
            if layer.spec.is_moe:
                watched.enter_context(layer.moe.register_forward_hook(signals.hook_router(layer.spec.index)))
        for tokens in token_batches:
            hidden = model.hidden(tokens)
            model.logits(hidden)
            model.mtp(tokens, hidden)
            n_sequences += tokens.shape[0]
            n_tokens += tokens.numel()
    return products.imatrix(n_sequences, n_tokens), signals.activations(products.outputs())


class _Products(TorchFunctionMode):
    """Sums over every F.linear whose weight is one of the model's."""

    def __init__(self, model: Step35) -> None:
        super().__init__()
        self._matrix_at: dict[int, tuple[str, int]] = {}  # address of a weight matrix -> tensor, expert
        self._inputs: dict[str, Tensor] = {}  # tensor -> [n_matrix, columns] sums of x^2
        self._outputs: dict[str, Tensor] = {}  # tensor -> [n_matrix] sums over tokens of the mean y^2
        self._counts: dict[str, Tensor] = {}  # tensor -> [n_matrix] tokens
        parameters = dict(model.named_parameters())
        for spec in tensor_specs(model.hp):
            if len(spec.shape) < 2:
                continue
            matrices = parameters[spec.source].reshape(-1, *spec.shape[-2:])
            self._matrix_at |= {matrix.data_ptr(): (spec.name, i) for i, matrix in enumerate(matrices)}
            self._inputs[spec.name] = torch.zeros(len(matrices), spec.shape[-1], dtype=torch.float64)
            self._outputs[spec.name], self._counts[spec.name] = torch.zeros(2, len(matrices), dtype=torch.float64)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is F.linear and (found := self._matrix_at.get(args[1].data_ptr())):
            name, i = found
            x = args[0].reshape(-1, args[0].shape[-1]).double()
            self._inputs[name][i] += x.square().sum(0)
            self._outputs[name][i] += result.double().square().sum() / result.shape[-1]
            self._counts[name][i] += len(x)
        return result

    def _seen(self) -> list[str]:
        """The tensors that took part. Not the embedding and the router: they are no F.linear."""
        return [name for name, n in self._counts.items() if n.any()]

    def imatrix(self, n_sequences: int, n_tokens: int) -> Imatrix:
        """The importance matrix. A chunk is a sequence; chunk_size is the sequences' mean length, rounded."""
        entries = {
            name: ImatrixEntry(self._inputs[name].float().numpy(), self._counts[name].float().numpy())
            for name in self._seen()
        }
        return Imatrix(None, (), n_sequences, round(n_tokens / max(1, n_sequences)), entries)

    def outputs(self) -> dict[str, Doubles]:
        """The mean y^2 of each product, as `Activations.outputs` has it."""
        return {name: (self._outputs[name] / self._counts[name].clamp(min=1)).numpy() for name in self._seen()}


class _Signals:
    """Sums over what leaves each layer and over the router's weights."""

    def __init__(self, n_expert: int) -> None:
        self._n_expert = n_expert
        self._residual: dict[int, list[float]] = {}  # layer -> sum of squares, number of values
        self._gates: dict[int, Tensor] = {}  # layer -> [3, n_expert]: sums of 1, w, w^2

    def add_layer(self, layer: nn.Module, args: Any, x: Tensor) -> None:
        """A forward hook of a layer, whose output is x."""
        assert isinstance(layer, DecoderLayer)
        total = self._residual.setdefault(layer.spec.index, [0.0, 0])
        total[0] += x.double().square().sum().item()
        total[1] += x.numel()

    def hook_router(self, layer: int) -> Callable[[nn.Module, Any, Tensor], None]:
        """Make a forward hook for the experts of a layer; it routes their input once more to count the weights."""
        total = self._gates[layer] = torch.zeros(3, self._n_expert, dtype=torch.float64)

        def add_gates(moe: nn.Module, args: Any, _: Tensor) -> None:
            assert isinstance(moe, MoE)
            ids, weights = (part.flatten() for part in moe.route(args[0].reshape(-1, args[0].shape[-1])))
            w = weights.double()
            total.index_add_(1, ids, torch.stack([torch.ones_like(w), w, w * w]))

        return add_gates

    def activations(self, outputs: Mapping[str, Doubles]) -> Activations:
        means = {layer: (total[1:] / total[0].clamp(min=1)).numpy() for layer, total in self._gates.items()}
        return Activations(
            outputs=outputs,
            residual={layer: squares / n for layer, (squares, n) in self._residual.items()},
            gates={layer: mean[0] for layer, mean in means.items()},
            gate_squares={layer: mean[1] for layer, mean in means.items()},
        )
