"""One pass that quantizes: each layer's codes are chosen for what the quantized layers before it give.

Two streams of hidden states run side by side: the exact model's, and that of the model as it is quantized so far. In
each layer, place by place,

    attention in   q k v gate      what both streams give to it -> moments -> codes -> the quantized layer's weights
    attention out  o
    ffn in         gate up         of the MLP, or of the shared expert
    ffn out        down
    experts        one at a time: gate up, then down, by the tokens that the quantized stream routes to it

so that everything behind sees what it will see when the file runs. A place costs a pass of all rows through the layer
up to it; an expert only its tokens.

Guards: one row of tokens in HELD_OUT is left out of the moments, and a matrix keeps its stock codes unless its weighted
output error on those falls. How much the moments are trusted (SHRINKAGES) is chosen by them too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import Tensor, nn

from stepgguf.calibration.moments import PairMoments, TokenSample
from stepgguf.model.layers import Layer
from stepgguf.model.names import TensorName
from stepgguf.reference.model import DecoderLayer, swiglu
from stepgguf.reference.state_folder import Floats, StateFolder
from stepgguf.reference.stream import (
    CHUNK_TOKENS,
    EXPERTS_AHEAD,
    Meter,
    Progress,
    Routes,
    layer_mask,
    row_cost,
    row_slices,
    run_expert,
    stream_identity,
)
from stepgguf.reference.token_rows import TokenRows
from stepgguf.reference.weights import EXPERT_ROLES, WeightReader, expert_name

HELD_OUT = 8  # one row in so many
SAMPLE_TOKENS = 1024  # of the held-out ones, that a dense matrix is tried on
MOMENT_TOKENS = 16384  # of an expert, at most: four for each column
PRIOR_TOKENS = 8.0  # of the layer's moments in an expert's
TokenWeightsOf = Callable[
    [TensorName], NDArray[np.float32]
]  # what errors at a product count for each token of all rows
Place = Callable[[DecoderLayer, Tensor, Tensor], Tensor]  # of a layer, rows of its input and a mask: what a place gets


class CodeSearch(Protocol):
    """Chooses the codes of a matrix."""

    def embed(self, values: Floats) -> Floats:
        """What the codes of the embedding's rows [n, hidden] stand for."""

    def choose(
        self, name: TensorName, expert: int, weights: Tensor, moments: PairMoments, held_out: TokenSample
    ) -> Tensor:
        """The values [rows, columns] that the chosen codes of these weights stand for."""

    def end_layer(self) -> None:
        """All codes of a layer, or of the head, are chosen: they must be safe before the pass goes on."""


@dataclass(frozen=True, eq=False, slots=True)
class LayerPair:
    """The exact layer, and the one whose weights are replaced by what their codes stand for."""

    exact: DecoderLayer
    quantized: DecoderLayer


class SequentialPass:
    """Runs the trunk. A folder that holds the states of the same run is gone on with after its last whole layer.

    token_weights: without, all tokens count alike.
    """

    def __init__(
        self,
        reader: WeightReader,
        rows: TokenRows,
        folder: Path,
        search: CodeSearch,
        *,
        token_weights: TokenWeightsOf | None = None,
        progress: Progress = lambda done: None,
    ) -> None:
        self.hp, self.rows = reader.hp, rows
        self._reader, self._search, self._weights = reader, search, token_weights
        shape, identity = (rows.n_rows, rows.row_length, self.hp.hidden_size), stream_identity(reader, rows)
        self._exact = StateFolder(folder / "exact", shape, identity)
        self._quantized = StateFolder(folder / "quantized", shape, identity)
        held = np.arange(rows.n_rows) % HELD_OUT == HELD_OUT - 1
        self._held_out = np.repeat(held, rows.row_length)
        self._meter = Meter(reader, rows, self.hp.trunk_layers, progress)

    @property
    def next_layer(self) -> int:
        """The layer that comes next; n_layer if only the head is left."""
        return max(0, min(self._exact.last_states(), self._quantized.last_states()))

    def restart(self) -> None:
        """Forget the layers that have run."""
        self._exact.restart()
        self._quantized.restart()

    def run(self) -> None:
        """Choose the codes of every quantized matrix of the trunk, its head included."""
        self._embed()
        first = self.next_layer
        for layer in self.hp.trunk_layers:
            if layer.index < first:
                self._meter.skip(layer.index)
            else:
                self._run_layer(layer)
        self._run_head()

    @torch.no_grad()
    def _run_layer(self, layer: Layer) -> None:
        exact = self._reader.layer(layer)
        pair = LayerPair(exact, copy.deepcopy(exact))
        i, shape = layer.index, (self.rows.n_rows, self.rows.row_length, self.hp.hidden_size)
        states = self._exact.states(i), self._quantized.states(i)
        with ExitStack() as files:
            out = tuple(files.enter_context(f.writing_states(i + 1)) for f in (self._exact, self._quantized))
            middle = tuple(files.enter_context(f.scratch("middle", shape)) for f in (self._exact, self._quantized))
            self._solve(
                pair,
                _attention_in,
                ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.g_proj"),
                states,
            )
            self._solve(pair, _attention_out, ("self_attn.o_proj",), states)
            self._apply(pair, _attend, states, middle)
            mlp = "share_expert" if layer.is_moe else "mlp"
            pool = self._solve(pair, _ffn_in, (f"{mlp}.gate_proj", f"{mlp}.up_proj"), middle)
            self._solve(pair, _ffn_out, (f"{mlp}.down_proj",), middle)
            self._apply(pair, _resident_ffn, middle, out)
            self._meter.add(i, row_cost(exact) * self.rows.n_tokens)
            if layer.is_moe:
                self._run_experts(pair, pool, middle, out)
            self._search.end_layer()
        for folder in (self._exact, self._quantized):
            folder.drop_states(i)

    def _solve(self, pair: LayerPair, place: Place, paths: Sequence[str], inputs: Sequence[Floats]) -> PairMoments:
        """Choose the codes of the matrices at a place; gives the moments there."""
        index = pair.exact.spec.index
        names = [self._reader.name_of(f"model.layers.{index}.{path}.weight") for path in paths]
        linears = [pair.exact.get_submodule(path) for path in paths]
        moments, held_out = self._gather(pair, place, inputs, self._token_weights(names))
        for name, path, linear in zip(names, paths, linears, strict=True):
            assert isinstance(linear, nn.Linear)
            target = pair.quantized.get_submodule(path)
            target.weight = nn.Parameter(self._search.choose(name, 0, linear.weight, moments, held_out), False)
        return moments

    def _gather(
        self, pair: LayerPair, place: Place, inputs: Sequence[Floats], weights: Tensor | None
    ) -> tuple[PairMoments, TokenSample]:
        """The moments of what a place is given by all tokens, and a sample of those that are held out."""
        moments: PairMoments | None = None
        sample = []
        for part in row_slices(self.rows, CHUNK_TOKENS):
            mask = layer_mask(self.hp, pair.exact.spec, self.rows, part, self._reader.device)
            exact, quantized = (
                place(module, self._reader.to_device(states[part]), mask).flatten(0, 1)
                for module, states in zip((pair.exact, pair.quantized), inputs, strict=True)
            )
            moments = moments or PairMoments(exact.shape[-1], exact.device)
            sample.append(self._count(moments, part, exact, quantized, weights))
        assert moments is not None
        return moments, _thinned(sample)

    def _count(
        self, moments: PairMoments, part: slice, exact: Tensor, quantized: Tensor, weights: Tensor | None
    ) -> TokenSample:
        """Count some rows' tokens [n, columns] in the moments; gives those that are held out. Padding is neither."""
        flat = slice(part.start * self.rows.row_length, part.stop * self.rows.row_length)
        w = torch.ones(len(exact)) if weights is None else weights[flat]
        text, held = torch.from_numpy(self.rows.text.ravel()[flat]), torch.from_numpy(self._held_out[flat])
        seen, tried = text & ~held, text & held
        moments.add(quantized[seen], exact[seen], w[seen])
        return TokenSample(quantized[tried], exact[tried], w[tried])

    def _apply(self, pair: LayerPair, step: Place, inputs: Sequence[Floats], outputs: Sequence[Floats]) -> None:
        for part in row_slices(self.rows, CHUNK_TOKENS):
            mask = layer_mask(self.hp, pair.exact.spec, self.rows, part, self._reader.device)
            for module, states, out in zip((pair.exact, pair.quantized), inputs, outputs, strict=True):
                out[part] = step(module, self._reader.to_device(states[part]), mask).cpu().numpy()

    def _run_experts(
        self, pair: LayerPair, pool: PairMoments, inputs: Sequence[Floats], outputs: Sequence[Floats]
    ) -> None:
        """Choose the codes of the routed experts, and add what the experts give to both outputs."""
        layer, shape = pair.exact.spec, (self.rows.n_rows * self.rows.row_length, self.hp.hidden_size)
        with ExitStack() as files:
            normed = [files.enter_context(f.scratch("normed", shape)) for f in (self._exact, self._quantized)]
            self._apply(pair, _ffn_in, inputs, [n.reshape(outputs[0].shape) for n in normed])
            routes = [self._route(pair.exact, n) for n in normed]  # the router keeps its weights
            for expert in range(self.hp.n_expert):
                for ahead in range(expert, min(expert + EXPERTS_AHEAD, self.hp.n_expert)):
                    self._reader.prefetch_expert(layer.index, ahead)
                exact = self._reader.expert(layer.index, expert)
                seen = self._expert_tokens(layer, routes[1].of(expert)[0], normed)
                chosen = self._choose_expert(layer, expert, exact, seen, pool)
                for matrices, route, x, out in zip((exact, chosen), routes, normed, outputs, strict=True):
                    self._add_expert(matrices, route.of(expert), x, out.reshape(shape), layer.clamp)
                self._meter.add(layer.index, sum(matrix.numel() for matrix in exact) * len(routes[0].slots_of(expert)))

    def _route(self, module: DecoderLayer, normed: Floats) -> Routes:
        parts = []
        for start in range(0, len(normed), CHUNK_TOKENS):
            ids, weights = module.moe.route(self._reader.to_device(normed[start : start + CHUNK_TOKENS]))
            parts.append((ids.cpu(), weights.cpu()))
        return Routes(parts, self.rows.text)

    def _expert_tokens(self, layer: Layer, places: NDArray[np.int64], normed: Sequence[Floats]) -> _ExpertTokens:
        """What both streams have for the tokens of an expert, at most MOMENT_TOKENS of them, evenly picked."""
        places = places[:: max(1, -(-len(places) // MOMENT_TOKENS))]
        exact, quantized = (self._reader.to_device(x[places]) for x in normed)
        held = torch.from_numpy(self._held_out[places])
        return _ExpertTokens(exact, quantized, held, places)

    def _choose_expert(
        self, layer: Layer, expert: int, exact: Sequence[Tensor], seen: _ExpertTokens, pool: PairMoments
    ) -> list[Tensor]:
        """The gate, up and down projections that the chosen codes of a routed expert stand for."""
        gate, up, down = names = [expert_name(layer.index, role) for role in EXPERT_ROLES]
        weights = self._token_weights([gate, up])
        moments, held_out = seen.moments(weights)
        moments = moments.pooled_with(pool, PRIOR_TOKENS)
        chosen = [
            self._search.choose(name, expert, matrix, moments, held_out)
            for name, matrix in zip((gate, up), exact, strict=False)
        ]
        units = [
            swiglu(F.linear(x, g), F.linear(x, u), layer.clamp)
            for x, (g, u) in ((seen.exact, exact[:2]), (seen.quantized, chosen))
        ]
        moments, held_out = replace(seen, exact=units[0], quantized=units[1]).moments(self._token_weights([down]))
        return [*chosen, self._search.choose(names[2], expert, exact[2], moments.own_with(PRIOR_TOKENS), held_out)]

    def _add_expert(
        self,
        matrices: Sequence[Tensor],
        route: tuple[NDArray[np.int64], Tensor],
        normed: Floats,
        out: Floats,
        clamp: float,
    ) -> None:
        """Add a routed expert's weighted output to that of its tokens."""
        places, weights = route
        for start in range(0, len(places), CHUNK_TOKENS):
            here = places[start : start + CHUNK_TOKENS]
            _, y = run_expert(matrices, self._reader.to_device(normed[here]), clamp)[-1]
            out[here] += (y * weights[start : start + CHUNK_TOKENS, None].to(y.device)).cpu().numpy()

    @torch.no_grad()
    def _run_head(self) -> None:
        norm, output = self._reader.head()
        states = [folder.states(self.hp.n_layer) for folder in (self._exact, self._quantized)]
        name = TensorName("output.weight")
        moments, sample = PairMoments(self.hp.hidden_size, self._reader.device), []
        weights = self._token_weights([name])
        for part in row_slices(self.rows, CHUNK_TOKENS):
            exact, quantized = (norm(self._reader.to_device(x[part])).flatten(0, 1) for x in states)
            sample.append(self._count(moments, part, exact, quantized, weights))
        self._search.choose(name, 0, output.weight, moments, _thinned(sample))
        self._search.end_layer()
        self._meter.add(None, output.weight.numel() * self.rows.n_tokens)

    def _embed(self) -> None:
        if min(self._exact.last_states(), self._quantized.last_states()) < 0:
            with self._exact.writing_states(0) as exact, self._quantized.writing_states(0) as quantized:
                self._reader.embed(self.rows.tokens, exact)
                quantized[:] = self._search.embed(exact.reshape(-1, self.hp.hidden_size)).reshape(exact.shape)

    def _token_weights(self, names: Sequence[TensorName]) -> Tensor | None:
        """What an error at these products counts for each token; None where all tokens count alike."""
        if self._weights is None:
            return None
        return self._reader.to_device(np.sum([self._weights(name) for name in names], axis=0, dtype=np.float32))


@dataclass(frozen=True, eq=False, slots=True)
class _ExpertTokens:
    """What both streams have for an expert's tokens, [n, columns]; which are held out; their places in all rows."""

    exact: Tensor
    quantized: Tensor
    held_out: Tensor
    places: NDArray[np.int64]

    def moments(self, weights: Tensor | None) -> tuple[PairMoments, TokenSample]:
        """The moments of those that are not held out, and the others. weights: of all tokens of all rows."""
        moments = PairMoments(self.exact.shape[-1], self.exact.device)
        w = torch.ones(len(self.exact)) if weights is None else weights[torch.from_numpy(self.places)]
        seen = ~self.held_out
        moments.add(self.quantized[seen], self.exact[seen], w[seen])
        return moments, TokenSample(self.quantized[self.held_out], self.exact[self.held_out], w[self.held_out])


def _thinned(parts: Sequence[TokenSample]) -> TokenSample:
    """At most SAMPLE_TOKENS of all parts together, evenly picked."""
    quantized, exact, weights = (
        torch.cat(column) for column in zip(*((p.quantized, p.exact, p.weights) for p in parts), strict=True)
    )
    step = max(1, -(-len(weights) // SAMPLE_TOKENS))
    return TokenSample(quantized[::step], exact[::step], weights[::step])


def _attention_in(layer: DecoderLayer, x: Tensor, mask: Tensor) -> Tensor:
    normed: Tensor = layer.input_layernorm(x)
    return normed


def _attention_out(layer: DecoderLayer, x: Tensor, mask: Tensor) -> Tensor:
    return layer.self_attn.mix(layer.input_layernorm(x), mask)


def _attend(layer: DecoderLayer, x: Tensor, mask: Tensor) -> Tensor:
    return layer.attend(x, mask)


def _ffn_in(layer: DecoderLayer, x: Tensor, mask: Tensor) -> Tensor:
    normed: Tensor = layer.post_attention_layernorm(x)
    return normed


def _ffn_out(layer: DecoderLayer, x: Tensor, mask: Tensor) -> Tensor:
    mlp = layer.share_expert if layer.spec.is_moe else layer.mlp
    return mlp.units(layer.post_attention_layernorm(x))


def _resident_ffn(layer: DecoderLayer, x: Tensor, mask: Tensor) -> Tensor:
    """All that the layer gives but its routed experts' part."""
    mlp = layer.share_expert if layer.spec.is_moe else layer.mlp
    result: Tensor = x + mlp(layer.post_attention_layernorm(x))
    return result
