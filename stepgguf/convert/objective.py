"""How much a tensor's error counts: by what part of the residual stream its block writes.

    x = embedding;   x += attention;   x += ffn;   x += attention;   ...        logits = output(norm(x))

    cost[t, k] = weight[t] * error[t, k]        error: measured, the part of the tensor's output that is lost
    weight[t]  = energy of what the block of t adds / energy of x after it      1 for token_embd and output

All that reads x norms it first, so an error counts by its size beside x: a block that adds a hundredth of x can lose a
third of its output for what the first block pays for a thousandth. And an error in what is multiplied into a block's
output (q, k, v, gate, up) is the same part of that output, to first order.

Two estimates of a weight, and where both can be had, their geometric mean:

    a priori    every block adds as much as any other: the n-th to write adds 1 / (n + 1) of x, routed and shared
                experts half of that each
    measured    energies of the tensors that write (token_embd, attn_output, ffn_down and its kinds), which need an
                imatrix; what blocks add is taken as uncorrelated, so energies add up. A token's experts share one sum
                of weights, the router's scale: evenly, so that they add scale^2 / n_used times the energy of one

The measured one knows the model, but it is an average over tokens, and the few tokens with massive activations (the
first of a text, arXiv 2402.17762) can make most of a layer's; the mean with the other halves that in the exponent.

Measured on the embedded model, one tensor at a time crushed with an imatrix (the 48 whose rows divide into Q3_K), KL
divergence from the original over 11,000 held-out tokens: its rank correlation with the cost is 0.80 for Q3_K and 0.76
for Q2_K, with the error alone 0.33 and 0.37. Allocated by the error alone, files of the size of Q3_K_S and Q4_K_S are
worse than stock (1.9 and 1.4 times its divergence); by this cost, better (benchmarks/allocation.py). A weight for each
role on top is left out: what 48 tensors of one small model would say about roles is not known to hold for another.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stepgguf.convert.cost_file import TypeCosts
from stepgguf.convert.importance import Importance
from stepgguf.convert.measure import TensorErrors, possible_types
from stepgguf.convert.plan import PlannedTensor
from stepgguf.errors import CostsError
from stepgguf.model.names import TensorName
from stepgguf.quants.allocate import TensorOptions, TypeOption

_SAME_BLOCK = ("ffn_down_exps", "ffn_down_shexp")  # two writers of one block


@dataclass(frozen=True, slots=True)
class Routing:
    """The model's router: experts, experts that a token uses, and the sum of their weights."""

    n_expert: int
    n_used: int
    scale: float


def weigh_options(
    tensors: Sequence[PlannedTensor],
    measured: Mapping[str, TensorErrors],
    routing: Routing,
    importance: Importance | None,
) -> list[TensorOptions]:
    """What allocate_bytes chooses from: `tensors`, all that are quantized of the trunk, with every type measured."""
    writers = sorted((t for t in tensors if _writing_tensor(t) == t.name and t.role != "output"), key=_writing_order)
    weights = _stream_shares({t.name: 0.5 if t.role in _SAME_BLOCK else 1.0 for t in writers})
    # The embedding is looked up and not multiplied: its energy is known without an imatrix.
    if importance is not None and all(importance.has(t.name, t.shape) for t in writers if t.role != "token_embd"):
        evenly = routing.scale**2 / routing.n_used
        energies = {t.name: measured[t.name].energy * (evenly if t.role == "ffn_down_exps" else 1.0) for t in writers}
        weights = {name: math.sqrt(weights[name] * weight) for name, weight in _stream_shares(energies).items()}
    return [
        TensorOptions(
            tensor.name,
            tuple(
                TypeOption(ggml_type, tensor.bytes_as(ggml_type), weights.get(_writing_tensor(tensor), 1.0) * error)
                for ggml_type, error in measured[tensor.name].errors.items()
            ),
            read_share(tensor, routing),
        )
        for tensor in tensors
    ]


def options_at_costs(
    tensors: Sequence[PlannedTensor], costs: TypeCosts, routing: Routing, importance: Importance | None
) -> list[TensorOptions]:
    """The same with costs that are known (cost_file.py). CostsError where they lack a type that a tensor can have."""
    types = {t.name: sorted(possible_types(t.name, t.shape, importance)) for t in tensors}
    missing = [f"{name} as {g.name}" for name, each in types.items() for g in each if g not in costs.get(name, {})]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise CostsError(
            f"the costs say nothing of {', '.join(missing[:3])}{more}",
            hint="Make the costs again, from the same source and with the same importance matrix.",
        )
    return [
        TensorOptions(
            t.name,
            tuple(
                TypeOption(ggml_type, t.bytes_as(ggml_type), costs[t.name][ggml_type]) for ggml_type in types[t.name]
            ),
            read_share(t, routing),
        )
        for t in tensors
    ]


def read_share(tensor: PlannedTensor, routing: Routing) -> float:
    """How often each byte is read for a token: of the embedding one row, of routed experts those that are used."""
    if tensor.role == "token_embd":
        return 1 / tensor.shape[0]
    return routing.n_used / routing.n_expert if tensor.name.is_expert else 1.0


def _writing_tensor(tensor: PlannedTensor) -> str:
    """The tensor that writes what this one takes part in: attn_output for attn_q, ffn_down_exps for ffn_up_exps."""
    if tensor.name.layer is None:
        return tensor.name
    role = tensor.role
    writer = "attn_output" if role.startswith("attn_") else role.replace("_gate", "_down").replace("_up", "_down")
    return f"blk.{tensor.name.layer}.{writer}.weight"


def _writing_order(tensor: PlannedTensor) -> tuple[int, bool]:
    """The embedding, then layer by layer attention before the rest."""
    layer = tensor.name.layer
    return -1 if layer is None else layer, tensor.role != "attn_output"


def _stream_shares(added: Mapping[TensorName, float]) -> dict[str, float]:
    """Each writer's part of the stream that it leaves. Routed and shared experts of a layer write at once."""
    weights: dict[str, float] = {}
    stream = 0.0
    for _, group in itertools.groupby(added, key=_block_of):
        names = list(group)
        stream += sum(added[name] for name in names)
        weights |= {name: added[name] / stream if stream else 1.0 for name in names}
    return weights


def _block_of(name: TensorName) -> tuple[int | None, bool]:
    """Layer, and whether it is the attention's."""
    return name.layer, name.role == "attn_output"
