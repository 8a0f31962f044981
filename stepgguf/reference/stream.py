"""Layer streaming: all tokens pass through one layer, then all through the next, so that each is read once.

    states-0 = embed(tokens)
    for each layer:    rows of tokens, a few at a time:   x1 = x + attention(norm(x));  y = norm(x1)
                                                          out = x1 + shared expert(y), or x1 + MLP(y)
                       expert by expert, its tokens:      out += weight * expert(y)
    logits = head(states-45);  MTP blocks after that, each a layer with an input of its own

The model has 394 GB and a layer 9 GB, nearly all of it routed experts. Only one expert is in memory, with the tokens
that are routed to it; the next ones are read ahead by the system. What all tokens have at one place lies in mapped
files (state_folder.py). It is the arithmetic of model.py, whose modules do it, in another order.

Observers see every product y = W x of the model but the router's, which nobody quantizes: weight, expert, x and y.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import Tensor, nn

from stepgguf.model.hparams import HParams
from stepgguf.model.layers import Layer
from stepgguf.model.names import TensorName
from stepgguf.reference.model import DecoderLayer, causal_mask, swiglu
from stepgguf.reference.state_folder import Floats, StateFolder
from stepgguf.reference.token_rows import TokenRows
from stepgguf.reference.weights import EXPERT_ROLES, WeightReader, expert_name

CHUNK_TOKENS = 4096  # that pass attention, or an expert, at a time
HEAD_TOKENS = 1024  # whose logits are in memory at a time: 0.5 GB at real size
EXPERTS_AHEAD = 4  # that the system reads while one runs
HEAD = "head"
Part = tuple[slice, slice]  # rows, and tokens of each


class Observer(Protocol):
    """Sees the products of a stream. What it keeps of a layer is taken when the layer is done, and saved with it."""

    name: str

    def add_product(self, name: TensorName, expert: int, x: Tensor, y: Tensor) -> None:
        """Some tokens' inputs x [n, columns] and outputs y [n, rows] of a weight; expert 0 where there are none."""

    def take(self) -> dict[str, NDArray[np.generic]]:
        """What was found since the last call, by names of its own."""


@dataclass(frozen=True, slots=True)
class LayerProgress:
    """How far a stream is: `done` of `total` multiplications, in `layer` (None: the head).

    earlier: of what is done, what an earlier run did.
    """

    layer: int | None
    done: int
    total: int
    earlier: int


Progress = Callable[[LayerProgress], None]


class LayerStream:
    """Runs tokens through the model, layer by layer. A folder that holds states of the same run is gone on with.

    keep_inputs: what enters each layer stays in the folder, for a pass backwards.
    """

    def __init__(
        self,
        reader: WeightReader,
        rows: TokenRows,
        folder: Path,
        *,
        observers: Sequence[Observer] = (),
        keep_inputs: bool = False,
        progress: Progress = lambda done: None,
    ) -> None:
        self.hp, self.rows, self.reader = reader.hp, rows, reader
        self._observers, self._keep_inputs = observers, keep_inputs
        shape = (rows.n_rows, rows.row_length, self.hp.hidden_size)
        names = [observer.name for observer in observers]
        self.folder = StateFolder(folder, shape, stream_identity(reader, rows) | {"observers": names})
        self._meter = Meter(reader, rows, reader.hp.layers, progress)
        self._text = torch.from_numpy(rows.text)

    def run_all(self) -> None:
        """Run the trunk, the head and the MTP blocks, for what observers find; no states are kept.

        What an earlier run has done is not done again.
        """
        if all(map(self.folder.has_found, self._stages)):
            return
        self.run_trunk()
        if self.folder.has_found(HEAD):
            self._meter.skip(None)
        else:
            for _ in self.logits():
                pass
        self.run_mtp()
        self.folder.drop_states(len(self.hp.layers))

    def run_trunk(self) -> None:
        """Run the trunk's layers. After it, what leaves the last one is there for `logits` and `run_mtp`."""
        self._embed()
        for layer in self.hp.trunk_layers:
            self._run_layer(layer)

    def run_mtp(self) -> None:
        """Run the MTP blocks, each on what the one before it gives, and their heads."""
        for layer in self.hp.layers[self.hp.n_layer :]:
            self._run_layer(layer)

    def logits(self) -> Iterator[tuple[Part, Tensor]]:
        """Yield the trunk's logits, some tokens of some rows at a time: which, and theirs [rows, tokens, vocab]."""
        norm, output = self.reader.head()
        states = self.folder.states(self.hp.n_layer)
        for part in head_parts(self.rows):
            with self._watching({"lm_head": output}, part):
                yield part, output(norm(self.reader.to_device(states[part])))
            self._meter.add(None, output.weight.numel() * self._n_text(part))
        self.folder.write_found(HEAD, self._take())

    def found(self) -> dict[str, dict[str, NDArray[np.generic]]]:
        """What the observers found in all that has run: observer -> its names -> arrays."""
        result: dict[str, dict[str, NDArray[np.generic]]] = {observer.name: {} for observer in self._observers}
        for stage in self._stages:
            for key, array in (self.folder.read_found(stage) or {}).items():
                observer, _, name = key.partition("/")
                result[observer][name] = array
        return result

    @property
    def _stages(self) -> list[int | str]:
        return [*range(len(self.hp.layers)), HEAD]

    def _embed(self) -> None:
        if self.folder.last_states() < 0:
            with self.folder.writing_states(0) as states:
                self.reader.embed(self.rows.tokens, states)

    @torch.no_grad()
    def _run_layer(self, layer: Layer) -> None:
        if layer.index < self.folder.last_states():
            self._meter.skip(layer.index)
            return
        module = self.reader.layer(layer)
        shape = (self.rows.n_rows * self.rows.row_length, self.hp.hidden_size)
        with ExitStack() as files:
            out = files.enter_context(self.folder.writing_states(layer.index + 1))
            normed = files.enter_context(self.folder.scratch("normed", shape)) if layer.is_moe else None
            routed = [self._run_rows(module, part, out, normed) for part in row_slices(self.rows, CHUNK_TOKENS)]
            if normed is not None:
                routes = Routes(routed, self.rows.text)
                self._run_experts(module, routes, normed, out.reshape(shape))
            self.folder.write_found(layer.index, self._take())
        if not self._keep_inputs:
            self.folder.drop_states(layer.index)

    def _run_rows(
        self, module: DecoderLayer, part: slice, out: Floats, normed: Floats | None
    ) -> tuple[Tensor, Tensor] | None:
        """All of a layer but its routed experts, for some rows; gives the experts' ids and weights of each token."""
        layer = module.spec
        x = self.reader.to_device(self.folder.states(layer.index)[part])
        with self._watching(product_modules(module, layer), part):
            if layer.is_mtp:
                x = module.combine(self._later_embeddings(part, 1 + layer.index - self.hp.n_layer), x)
            x = module.attend(x, layer_mask(self.hp, layer, self.rows, part, self.reader.device))
            y = module.post_attention_layernorm(x)
            x = x + (module.share_expert(y) if layer.is_moe else module.mlp(y))
            if layer.is_mtp:
                module.draft(x)
        out[part] = x.cpu().numpy()
        self._meter.add(layer.index, row_cost(module) * self._n_text(part))
        if normed is None:
            return None
        flat = y.flatten(0, 1)
        normed.reshape(self.rows.n_rows, -1, flat.shape[-1])[part] = y.cpu().numpy()
        ids, weights = module.moe.route(flat)
        return ids.cpu(), weights.cpu()

    def _run_experts(self, module: DecoderLayer, routes: Routes, normed: Floats, out: Floats) -> None:
        """Add what the routed experts give to out [tokens, hidden]; normed, of the same shape, is what they read."""
        layer = module.spec.index
        for part in self.expert_parts(layer, routes):
            products = run_expert(part.matrices, self.reader.to_device(normed[part.places]), module.moe.clamp)
            for role, (x, y) in zip(EXPERT_ROLES, products, strict=True):
                self._show(expert_name(layer, role), part.expert, x, y)
            out[part.places] += (products[-1][1] * self.reader.to_device(part.weights)[:, None]).cpu().numpy()
            self._meter.add(layer, part.cost)

    def expert_parts(self, layer: int, routes: Routes) -> Iterator[ExpertPart]:
        """The routed experts of a layer one after the other, each with some of its tokens at a time."""
        for expert in range(min(EXPERTS_AHEAD, self.hp.n_expert)):
            self.reader.prefetch_expert(layer, expert)
        for expert in range(self.hp.n_expert):
            if expert + EXPERTS_AHEAD < self.hp.n_expert:
                self.reader.prefetch_expert(layer, expert + EXPERTS_AHEAD)
            slots = routes.slots_of(expert)
            if len(slots):
                matrices = self.reader.expert(layer, expert)
                for start in range(0, len(slots), CHUNK_TOKENS):
                    here = slots[start : start + CHUNK_TOKENS]
                    yield ExpertPart(expert, matrices, here, here // routes.n_used, routes.weights[here])

    def _later_embeddings(self, part: slice, n: int) -> Tensor:
        """Of each position the embedding of the token n places on; at a row's end its last token stands in."""
        tokens = self.rows.tokens[part]
        shifted = np.concatenate([tokens[:, n:], np.repeat(tokens[:, -1:], min(n, tokens.shape[1]), axis=1)], axis=1)
        out = np.empty((*tokens.shape, self.hp.hidden_size), np.float32)
        self.reader.embed(shifted[:, : tokens.shape[1]], out)
        return self.reader.to_device(out)

    @contextmanager
    def _watching(self, modules: dict[str, nn.Linear], part: slice | Part) -> Iterator[None]:
        """Shows the observers what these modules, by their names in a checkpoint, are given and give for some rows."""
        text = self._text[part].flatten()

        def watch(path: str) -> Callable[[nn.Module, Any, Tensor], None]:
            name = self.reader.name_of(f"{path}.weight")

            def show(module: nn.Module, args: Any, y: Tensor) -> None:
                x = args[0]
                self._show(name, 0, x.reshape(-1, x.shape[-1])[text], y.reshape(-1, y.shape[-1])[text])

            return show

        hooks = [module.register_forward_hook(watch(path)) for path, module in modules.items() if self._observers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _show(self, name: TensorName, expert: int, x: Tensor, y: Tensor) -> None:
        for observer in self._observers:
            observer.add_product(name, expert, x, y)

    def _take(self) -> dict[str, NDArray[np.generic]]:
        return {f"{o.name}/{name}": array for o in self._observers for name, array in o.take().items()}

    def _n_text(self, part: slice | Part) -> int:
        return int(self._text[part].sum())


def layer_mask(hp: HParams, layer: Layer, rows: TokenRows, part: slice, device: torch.device) -> Tensor:
    """What each token of some rows may see in a layer, as model.causal_mask has it."""
    window = hp.sliding_window if layer.is_sliding else None
    documents = rows.documents[part]
    one = not (documents != documents[:, :1]).any()  # each row is one document
    return causal_mask(rows.row_length, window, None if one else torch.from_numpy(documents).to(device), device)


def run_expert(matrices: Sequence[Tensor], x: Tensor, clamp: float) -> list[tuple[Tensor, Tensor]]:
    """What a routed expert's gate, up and down products are given and give, for tokens x [n, hidden]."""
    gate, up, down = matrices
    gated, raised = F.linear(x, gate), F.linear(x, up)
    hidden = swiglu(gated, raised, clamp)
    return [(x, gated), (x, raised), (hidden, F.linear(hidden, down))]


@dataclass(frozen=True, eq=False, slots=True)
class ExpertPart:
    """Some of the tokens of a routed expert: its gate, up and down matrices and, for each token, three things.

    slots: where the expert stands in the ids of all tokens, [tokens, n_used] flattened. places: the token, counted
    through all rows. weights: the router's.
    """

    expert: int
    matrices: tuple[Tensor, Tensor, Tensor]
    slots: NDArray[np.int64]
    places: NDArray[np.int64]
    weights: Floats

    @property
    def cost(self) -> int:
        """Multiplications."""
        return sum(matrix.numel() for matrix in self.matrices) * len(self.slots)


class Routes:
    """Which tokens go to which expert, and with which weight. Padding goes to none.

    parts: ids and weights of the experts that each token uses, [tokens, n_used] both, of some rows after the other.
    text: where rows have text, [rows, tokens].
    """

    def __init__(self, parts: Sequence[tuple[Tensor, Tensor] | None], text: NDArray[np.bool_]) -> None:
        known = [part for part in parts if part is not None]
        ids, weights = (torch.cat(column).numpy() for column in zip(*known, strict=True))
        self.n_used = ids.shape[1]
        self.weights: Floats = weights.reshape(-1)
        slots = np.flatnonzero(np.repeat(text.reshape(-1), self.n_used))
        order = np.argsort(ids.reshape(-1)[slots], kind="stable")
        self._slots = slots[order]
        self._experts = ids.reshape(-1)[self._slots]

    def of(self, expert: int) -> tuple[NDArray[np.int64], Tensor]:
        """The expert's tokens, counted through all rows, and their weights."""
        slots = self.slots_of(expert)
        return slots // self.n_used, torch.from_numpy(self.weights[slots])

    def slots_of(self, expert: int) -> NDArray[np.int64]:
        """The expert's slots, in the tokens' order."""
        start, stop = np.searchsorted(self._experts, [expert, expert + 1])
        return self._slots[start:stop]


class Meter:
    """Counts multiplications for progress, of the head and some layers."""

    def __init__(self, reader: WeightReader, rows: TokenRows, layers: Sequence[Layer], progress: Progress) -> None:
        self._progress, self._done, self._earlier = progress, 0, 0
        self._costs: dict[int | None, int] = {None: reader.hp.vocab_size * reader.hp.hidden_size}  # of a token
        self._costs |= {layer.index: reader.layer_cost(layer) for layer in layers}
        self._n_tokens = rows.n_tokens

    def add(self, layer: int | None, multiplications: int) -> None:
        self._done += multiplications
        self._progress(LayerProgress(layer, self._done, self._n_tokens * sum(self._costs.values()), self._earlier))

    def skip(self, layer: int | None) -> None:
        """Count a layer, or the head, that an earlier run did."""
        self._earlier += self._costs[layer] * self._n_tokens
        self.add(layer, self._costs[layer] * self._n_tokens)


def product_modules(module: DecoderLayer, layer: Layer) -> dict[str, nn.Linear]:
    """The layer's products, by their names in a checkpoint: all but the router, whose weight stays as it is."""
    return {
        f"model.layers.{layer.index}.{path}": child
        for path, child in module.named_modules()
        if isinstance(child, nn.Linear) and path != "moe.gate"
    }


def row_cost(module: DecoderLayer) -> int:
    """Multiplications of a token in a layer, without its routed experts."""
    return sum(weight.numel() for weight in module.parameters() if weight.dim() == 2)


def row_slices(rows: TokenRows, n_tokens: int) -> Iterator[slice]:
    """Runs of rows with about so many tokens, at least a row each."""
    step = max(1, n_tokens // rows.row_length)
    return (slice(start, min(start + step, rows.n_rows)) for start in range(0, rows.n_rows, step))


def head_parts(rows: TokenRows) -> Iterator[Part]:
    """About HEAD_TOKENS tokens at a time: whole rows, or where one has more tokens, pieces of it."""
    for some_rows in row_slices(rows, HEAD_TOKENS):
        for start in range(0, rows.row_length, HEAD_TOKENS):
            yield some_rows, slice(start, min(start + HEAD_TOKENS, rows.row_length))


def stream_identity(reader: WeightReader, rows: TokenRows) -> dict[str, object]:
    """What the states of a stream depend on: the model and the text."""
    return {"source": reader.identity(), "rows": rows.digest}
