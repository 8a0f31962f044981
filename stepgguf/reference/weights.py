"""The reference model's weights, read from an opened source when they are needed: a layer, or one expert of it.

A checkpoint of 394 GB has layers of 9 GB, of which all but 0.2 GB are experts. So a layer is made whole but for its
experts, whose parameters stay without memory (on torch's "meta" device), and an expert is read, widened and dropped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stepgguf.convert.sources.source import TensorSource, rows_per_expert
from stepgguf.model.hparams import HParams
from stepgguf.model.layers import Layer
from stepgguf.model.names import TensorName
from stepgguf.model.rope import ROPE_FREQS
from stepgguf.model.tensors import TensorSpec, tensor_specs
from stepgguf.quants.values import widen
from stepgguf.reference.model import DecoderLayer, RMSNorm, rope_frequencies

EXPERT_ROLES = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
_READ_ROWS = 1024  # of the embedding, at a time


class WeightReader:
    """Reads weights of a source as float32 tensors on `device`, by their GGUF names."""

    def __init__(self, source: TensorSource, hp: HParams, device: torch.device) -> None:
        self.hp, self.device = hp, device
        self._source = source
        self._specs = {spec.name: spec for spec in source.specs}
        # The modules are named as checkpoints name their tensors, whatever the source calls them.
        self._names = {spec.source: spec for spec in tensor_specs(hp)}

    def to_device(self, values: NDArray[np.float32]) -> Tensor:
        """A copy of values where the model runs."""
        return torch.tensor(values, device=self.device)

    def matrix(self, name: TensorName, expert: int = 0) -> Tensor:
        """A tensor, or one expert's matrix of it [rows, columns], as the source stores it."""
        per_expert = rows_per_expert(self._specs[name].shape)
        return torch.from_numpy(self._rows(name, expert * per_expert, (expert + 1) * per_expert)).to(self.device)

    def expert(self, layer: int, expert: int) -> tuple[Tensor, Tensor, Tensor]:
        """The gate [size, hidden], up [size, hidden] and down [hidden, size] projections of a routed expert."""
        gate, up, down = (self.matrix(expert_name(layer, role), expert) for role in EXPERT_ROLES)
        return gate, up, down

    def prefetch_expert(self, layer: int, expert: int) -> None:
        """Have the system read an expert in the background."""
        for role in EXPERT_ROLES:
            spec = self._specs[expert_name(layer, role)]
            per_expert = rows_per_expert(spec.shape)
            self._source.prefetch(spec.source, expert * per_expert, (expert + 1) * per_expert)

    def identity(self) -> dict[str, str]:
        """What tells the source from a changed one."""
        return self._source.identity()

    def layer_cost(self, layer: Layer) -> int:
        """Multiplications of a token in a layer."""
        shapes = [spec.shape for spec in self._names.values() if spec.layer == layer.index and len(spec.shape) > 1]
        used = self.hp.n_expert_used
        return sum(math.prod(shape[-2:]) * (used if len(shape) == 3 else 1) for shape in shapes)

    def name_of(self, path: str) -> TensorName:
        """The GGUF name of the tensor that a checkpoint, and the reference model, call `path`."""
        return self._names[path].name

    def layer(self, layer: Layer) -> DecoderLayer:
        """A layer in which all but the routed experts' parameters have their values."""
        with torch.device("meta"):
            module = DecoderLayer(self.hp, layer)
        self._fill(module, f"model.layers.{layer.index}.")
        module.self_attn.frequencies = self._frequencies(layer).to(self.device)
        if layer.is_moe:
            module.moe.load = torch.zeros(self.hp.n_expert)
        return module.eval().requires_grad_(False)

    def head(self) -> tuple[RMSNorm, nn.Linear]:
        """The final norm and the output matrix."""
        with torch.device("meta"):
            norm = RMSNorm(self.hp.hidden_size, self.hp.rms_norm_eps)
            output = nn.Linear(self.hp.hidden_size, self.hp.vocab_size, bias=False)
        self._fill(norm, "model.norm.")
        self._fill(output, "lm_head.")
        return norm.requires_grad_(False), output.requires_grad_(False)

    def embed(self, tokens: NDArray[np.int32], out: NDArray[np.float32]) -> None:
        """Write the embeddings of tokens [n, t] into out [n, t, hidden]."""
        ids, places = np.unique(tokens, return_inverse=True)
        places = places.reshape(tokens.shape)
        name = TensorName("token_embd.weight")
        for first in range(0, self.hp.vocab_size, _READ_ROWS):
            here = (ids >= first) & (ids < first + _READ_ROWS)
            if here.any():
                rows = self._rows(name, first, min(first + _READ_ROWS, self.hp.vocab_size))
                start, stop = np.flatnonzero(here)[[0, -1]] + [0, 1]
                wanted = (places >= start) & (places < stop)
                out[wanted] = rows[ids[places[wanted]] - first]

    def _frequencies(self, layer: Layer) -> Tensor:
        """As model.rope_frequencies has them; of the scaling, a GGUF says only what it divides each frequency by."""
        frequencies = rope_frequencies(layer, None)
        if layer.is_sliding:
            return frequencies
        constant = self._source.constants.get(ROPE_FREQS)
        if constant is None and ROPE_FREQS not in self._specs:
            return frequencies
        factors = np.frombuffer(constant, np.float32) if constant is not None else self._rows(ROPE_FREQS, 0, 1)[0]
        return frequencies / torch.from_numpy(factors[: len(frequencies)].copy())

    def _fill(self, module: nn.Module, prefix: str) -> None:
        """Give every parameter but the routed experts' its value."""
        values = {path: self._parameter(self._names[prefix + path]) for path, _ in _resident_parameters(module)}
        module.load_state_dict(values, strict=False, assign=True)

    def _parameter(self, spec: TensorSpec) -> Tensor:
        """A tensor as the modules have it: norms less one, which a GGUF stores whole."""
        values = self.matrix(spec.name).reshape(spec.shape)
        return values - 1.0 if spec.plus_one and not self._specs[spec.name].plus_one else values

    def _rows(self, name: TensorName, start: int, stop: int) -> NDArray[np.float32]:
        stored = self._source.values(self._specs[name].source, start, stop)
        out = np.empty(stored.shape, np.float32)
        widen(stored, out)
        return out


def expert_name(layer: int, role: str) -> TensorName:
    """The GGUF name of a layer's routed experts in this role."""
    return TensorName(f"blk.{layer}.{role}.weight")


def _resident_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((path, p) for path, p in module.named_parameters() if not path.startswith("moe.") or p.dim() < 3)
