"""One pass that quantizes: each layer's codes are chosen for what the quantized layers before it give.

The exact model has run, and what enters each of its layers is kept. Beside it run the hidden states of the model as it
is quantized so far. In each layer, place by place,

    attention in   q k v gate      what both streams give to it -> moments -> codes -> the quantized layer's weights
    attention out  o
    ffn in         gate up         of the MLP, or of the shared expert
    ffn out        down
    experts        gate up, then down, by the tokens that the quantized stream routes to each

so that everything behind sees what it will see when the file runs. A place costs a pass of all rows through the layer
up to it; an expert only its tokens. Experts do not depend on each other: each is worked on by one thread, and what they
give is added in their order.

Before all this, the codes of the embedding are chosen for the gradients that the exact model has there: an error e in
a token's embedding costs the square of g e, so the moments of g are to the embedding what those of x are to a matrix.

Guards: some of the text is left out of the moments (held_out.py), and other tokens run beside it (guard.py). A matrix
keeps its stock codes unless its error falls on the former, and does not rise on the latter.

The codes depend on the source, the text, the device, and on how sums are rounded: by the processor, torch, numpy's BLAS
and the number of threads that torch has. All these the same, so are the codes, interrupted or not.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stepgguf.calibration import places
from stepgguf.calibration.code_search import CodeSearch
from stepgguf.calibration.expert_codes import ExpertCodes
from stepgguf.calibration.held_out import HeldOut, held_out_tokens, thinned
from stepgguf.calibration.moments import PairMoments
from stepgguf.calibration.places import LayerPair, Place
from stepgguf.model.layers import Layer
from stepgguf.model.names import TensorName
from stepgguf.reference.model import DecoderLayer
from stepgguf.reference.state_folder import Floats, StateFolder
from stepgguf.reference.stream import (
    CHUNK_TOKENS,
    LayerStream,
    Meter,
    Progress,
    Routes,
    layer_mask,
    row_cost,
    row_slices,
    stream_identity,
)
from stepgguf.reference.weights import EXPERT_ROLES, expert_name

SAMPLE_TOKENS = 1024  # of the held-out ones, and of guard tokens, that a dense matrix is tried on
PLACE_TOKENS = 65536  # of the others, at most, that its moments are made of: five for each of up to 12,288 columns
EMBEDDING = -1  # as a layer's number
EMBEDDING_PRIOR = (
    4  # tokens of independent channels for each channel: one text's gradients are for all tokens there are
)
TokenWeightsOf = Callable[[TensorName], NDArray[np.float32]]  # what errors at a product count, of each token


class SequentialPass:
    """Goes through the trunk that `exact` ran with keep_inputs, in the folder "quantized" inside that stream's.

    What an interrupted pass of this identity has done is gone on with after its last whole layer; what enters layers
    that are done is removed. token_weights: [n_rows * row_length] for a tensor. at_embedding: gradients of the loss at
    what enters the first layer, [rows, tokens, hidden].
    """

    def __init__(
        self,
        exact: LayerStream,
        search: CodeSearch,
        token_weights: TokenWeightsOf,
        at_embedding: Floats,
        *,
        identity: Mapping[str, object],
        n_threads: int,
        progress: Progress = lambda done: None,
    ) -> None:
        self.hp, self.rows = exact.hp, exact.rows
        self._reader, self._search, self._weights_of, self._n_threads = exact.reader, search, token_weights, n_threads
        self._exact, self._at_embedding = exact.folder, at_embedding
        shape = (self.rows.n_rows, self.rows.row_length, self.hp.hidden_size)
        self._folder = StateFolder(
            exact.folder.path / "quantized", shape, {**stream_identity(self._reader, self.rows), **identity}
        )
        held = held_out_tokens(self.rows)
        self._held_out, self._guard = held.ravel(), self.rows.guard.ravel()
        self._seen = thinned(self.rows.text.ravel() & ~(self._held_out | self._guard), PLACE_TOKENS)
        self._tried = [thinned(mask, SAMPLE_TOKENS) for mask in (self._held_out, self._guard)]
        self._meter = Meter(self._reader, self.rows, self.hp.trunk_layers, progress)

    @property
    def next_layer(self) -> int:
        """The layer that comes next; n_layer if only the head is left, EMBEDDING if nothing is done."""
        return self._folder.last_states()

    @property
    def has_inputs(self) -> bool:
        """Whether the exact states that the next layer needs are there: those of layers before it are removed."""
        first = self._exact.first_states()
        return first is not None and first <= max(0, self.next_layer)

    def restart(self) -> None:
        """Forget the layers that have run."""
        self._folder.restart()

    def run(self) -> None:
        """Choose the codes of every quantized matrix of the trunk, its head included."""
        if self.next_layer == EMBEDDING:
            self._run_embedding()
        first = self.next_layer
        for layer in self.hp.trunk_layers:
            if layer.index < first:
                self._meter.skip(layer.index)
            else:
                self._run_layer(layer)
        self._run_head()

    @torch.no_grad()
    def _run_embedding(self) -> None:
        def inputs_of(part: slice) -> list[Tensor]:
            return 2 * [self._reader.to_device(self._at_embedding[part]).flatten(0, 1)]

        name = self._reader.name_of("model.embed_tokens.weight")
        alike = torch.ones(self.rows.text.size, device=self._reader.device)  # the gradients say what tokens weigh
        moments, held_out = self._count(inputs_of, alike)
        moments = moments.own_with(EMBEDDING_PRIOR * self.hp.hidden_size)
        chosen = self._search.choose(name, 0, self._reader.matrix(name), moments, held_out)
        self._search.end_layer()
        with self._folder.writing_states(0) as states:
            for part in row_slices(self.rows, CHUNK_TOKENS):
                states[part] = chosen[torch.from_numpy(self.rows.tokens[part]).to(chosen.device)].cpu().numpy()

    @torch.no_grad()
    def _run_layer(self, layer: Layer) -> None:
        exact = self._reader.layer(layer)
        pair = LayerPair(exact, copy.deepcopy(exact))
        i, shape = layer.index, (self.rows.n_rows, self.rows.row_length, self.hp.hidden_size)
        states = self._exact.states(i), self._folder.states(i)
        with ExitStack() as files:
            out = files.enter_context(self._folder.writing_states(i + 1))
            middle = [files.enter_context(self._folder.scratch(name, shape)) for name in ("exact-middle", "middle")]
            projections = [f"self_attn.{name}_proj" for name in "qkvg"]
            self._solve(pair, places.attention_in, projections, states)
            self._solve(pair, places.attention_out, ["self_attn.o_proj"], states)
            for module, values, result in zip((pair.exact, pair.quantized), states, middle, strict=True):
                self._apply(module, places.attend, values, result)
            mlp = "share_expert" if layer.is_moe else "mlp"
            pool = self._solve(pair, places.ffn_in, [f"{mlp}.gate_proj", f"{mlp}.up_proj"], middle)
            self._solve(pair, places.ffn_out, [f"{mlp}.down_proj"], middle)
            self._apply(pair.quantized, places.resident_ffn, middle[1], out)
            self._meter.add(i, row_cost(exact) * self.rows.n_tokens)
            if layer.is_moe:
                self._run_experts(pair, pool, middle, out.reshape(-1, self.hp.hidden_size))
            self._search.end_layer()
        for folder in (self._exact, self._folder):
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
        self, pair: LayerPair, place: Place, inputs: Sequence[Floats], weights: Tensor
    ) -> tuple[PairMoments, HeldOut]:
        """The moments of what a place is given by all tokens, and a sample of those that are held out."""

        def inputs_of(part: slice) -> list[Tensor]:
            mask = self._mask(pair.exact, part)
            return [
                place(module, self._reader.to_device(states[part]), mask).flatten(0, 1)
                for module, states in zip((pair.exact, pair.quantized), inputs, strict=True)
            ]

        return self._count(inputs_of, weights)

    def _count(self, inputs_of: Callable[[slice], Sequence[Tensor]], weights: Tensor) -> tuple[PairMoments, HeldOut]:
        """Moments and sample of what some rows' tokens have, exact and quantized [n, columns]."""
        moments: PairMoments | None = None
        samples = []
        for part in row_slices(self.rows, CHUNK_TOKENS):
            exact, quantized = inputs_of(part)
            flat = slice(part.start * self.rows.row_length, part.stop * self.rows.row_length)
            seen, *tried = (torch.from_numpy(mask[flat]) for mask in (self._seen, *self._tried))
            w = weights[flat]
            moments = moments or PairMoments(exact.shape[-1], exact.device)
            moments.add(quantized[seen], exact[seen], w[seen])
            samples.append(HeldOut.of(quantized, exact, w, *tried))
        assert moments is not None
        return moments, HeldOut.joined(samples)

    def _apply(self, module: DecoderLayer, step: Place, inputs: Floats, outputs: Floats) -> None:
        for part in row_slices(self.rows, CHUNK_TOKENS):
            x = self._reader.to_device(inputs[part])
            outputs[part] = step(module, x, self._mask(module, part)).cpu().numpy()

    def _mask(self, module: DecoderLayer, part: slice) -> Tensor:
        return layer_mask(self.hp, module.spec, self.rows, part, self._reader.device)

    def _run_experts(self, pair: LayerPair, pool: PairMoments, inputs: Sequence[Floats], out: Floats) -> None:
        """Choose the codes of the routed experts, and add what they give to out [tokens, hidden]."""
        layer = pair.exact.spec
        with ExitStack() as files:
            normed = [files.enter_context(self._folder.scratch(name, out.shape)) for name in ("exact-normed", "normed")]
            for module, values, result in zip((pair.exact, pair.quantized), inputs, normed, strict=True):
                self._apply(module, places.ffn_in, values, result.reshape(values.shape))
            routes = self._route(pair.exact, normed[1])  # the router keeps its weights
            experts = ExpertCodes(
                self._reader,
                self._search,
                layer,
                routes,
                normed,
                pool,
                *self._expert_weights(layer),
                self._held_out,
                self._guard,
            )
            for tokens, given in experts.choose_all(self._n_threads):
                out[tokens] += given
                self._meter.add(layer.index, 3 * self.hp.expert_size * self.hp.hidden_size * len(tokens))

    def _route(self, module: DecoderLayer, normed: Floats) -> Routes:
        parts = []
        for start in range(0, len(normed), CHUNK_TOKENS):
            ids, weights = module.moe.route(self._reader.to_device(normed[start : start + CHUNK_TOKENS]))
            parts.append((ids.cpu(), weights.cpu()))
        return Routes(parts, self.rows.text)

    def _expert_weights(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """What errors count for each token at the experts' gates and ups, and at their downs."""
        gate, up, down = (expert_name(layer.index, role) for role in EXPERT_ROLES)
        return self._token_weights([gate, up]), self._token_weights([down])

    @torch.no_grad()
    def _run_head(self) -> None:
        norm, output = self._reader.head()
        states = [folder.states(self.hp.n_layer) for folder in (self._exact, self._folder)]
        name = self._reader.name_of("lm_head.weight")

        def inputs_of(part: slice) -> list[Tensor]:
            return [norm(self._reader.to_device(x[part])).flatten(0, 1) for x in states]

        self._search.choose(name, 0, output.weight, *self._count(inputs_of, self._token_weights([name])))
        self._search.end_layer()
        self._meter.add(None, output.weight.numel() * self.rows.n_tokens)

    def _token_weights(self, names: Sequence[TensorName]) -> Tensor:
        """What an error at these products counts for each token."""
        return self._reader.to_device(np.sum([self._weights_of(name) for name in names], axis=0, dtype=np.float32))
