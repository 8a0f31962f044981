"""The pass backwards through a layer stream: gradients at the output of every product, for labels that the model draws.

    labels            drawn from the model's own predictions, so that squared gradients are the Fisher information
    gradients-45      d loss / d states-45, through the head; loss: the sum of all cross-entropies, in nats
    for each layer, from the last:    rows of tokens:     y = norm(x + attention(norm(x))), and the routes
                                      expert by expert:   d loss / dy and d loss / d weight of its tokens
                                      rows of tokens:     gradients-n = d loss / d states-n, from the two and
                                                          gradients-(n+1) through all of the layer but its experts

Like the stream it has in memory one expert, or some rows in one layer. What enters each layer must have been kept by
the stream; what lies in mapped files here is in the folder "gradients" inside the stream's, where "states-007" is the
gradient of what enters layer 7. A pass that was interrupted goes on before the last whole layer.

Observers see the gradients of each token. A document's last token predicts nothing, and padding has no gradient. MTP
blocks take no part, for an error in them costs speed and no answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stepgguf.model.layers import Layer
from stepgguf.model.names import TensorName
from stepgguf.reference.model import DecoderLayer
from stepgguf.reference.state_folder import Floats, StateFolder
from stepgguf.reference.stream import (
    CHUNK_TOKENS,
    HEAD,
    HEAD_TOKENS,
    ExpertPart,
    LayerStream,
    Meter,
    Progress,
    Routes,
    layer_mask,
    product_modules,
    row_cost,
    row_slices,
    run_expert,
    stream_identity,
)
from stepgguf.reference.weights import EXPERT_ROLES, expert_name

EMBEDDING = "embedding"


class GradientObserver(Protocol):
    """Sees the gradients of a pass. What it keeps of a layer is taken when the layer is done, and saved with it.

    settings: what its findings depend on besides model, text and labels, so that others are not gone on with.
    """

    name: str

    @property
    def settings(self) -> Mapping[str, object]: ...

    def add_product(self, name: TensorName, expert: int, places: NDArray[np.int64], x: Tensor, g: Tensor) -> None:
        """Some tokens' inputs x [n, columns] of a weight, and the loss's gradients g [n, rows] at its outputs.

        places [n]: the tokens, counted through all rows. expert: 0 where there are none.
        """

    def add_embedding(self, tokens: NDArray[np.int32], g: Tensor) -> None:
        """The gradients g [n, hidden] at the embeddings of some tokens [n]."""

    def take(self) -> dict[str, NDArray[np.generic]]:
        """What was found since the last call, by names of its own."""


class BackwardStream:
    """Goes back through the trunk that `stream` ran with keep_inputs. `seed` draws the labels."""

    def __init__(
        self,
        stream: LayerStream,
        *,
        seed: int = 0,
        observers: Sequence[GradientObserver] = (),
        progress: Progress = lambda done: None,
    ) -> None:
        self.stream, self.hp, self.rows, self._reader = stream, stream.hp, stream.rows, stream.reader
        self._seed, self._observers = seed, observers
        shape = (self.rows.n_rows, self.rows.row_length, self.hp.hidden_size)
        settings = {observer.name: dict(observer.settings) for observer in observers}
        identity = stream_identity(self._reader, self.rows) | {"seed": seed, "observers": settings}
        self.folder = StateFolder(stream.folder.path / "gradients", shape, identity)
        self._meter = Meter(self._reader, self.rows, self.hp.trunk_layers, progress)
        self._places = np.arange(self.rows.text.size).reshape(self.rows.text.shape)

    def run(self) -> None:
        """Run the head, the layers from the last to the first, and the embedding."""
        self._run_head()
        for layer in reversed(self.hp.trunk_layers):
            self._run_layer(layer)
        self._run_embedding()

    def found(self, observer: str, stage: int | str | None = None) -> dict[str, NDArray[np.generic]]:
        """What an observer found in all that has run, or at one stage: a layer, HEAD or EMBEDDING."""
        stages = [HEAD, *range(self.hp.n_layer), EMBEDDING] if stage is None else [stage]
        saved = [self.folder.read_found(each) or {} for each in stages]
        keys = [(key.partition("/"), array) for arrays in saved for key, array in arrays.items()]
        return {name: array for (owner, _, name), array in keys if owner == observer}

    def _run_head(self) -> None:
        if self.folder.first_states() is not None:
            self._meter.skip(None)
            return
        norm, output = self._reader.head()
        hidden = self.stream.folder.states(self.hp.n_layer)
        with self.folder.writing_states(self.hp.n_layer) as gradients:
            for part in row_slices(self.rows, HEAD_TOKENS):
                x = self._reader.to_device(hidden[part]).requires_grad_()
                gradients[part] = self._head_gradient(norm, output, x, part).cpu().numpy()
                self._meter.add(None, output.weight.numel() * int(self.rows.text[part].sum()))
            self.folder.write_found(HEAD, self._take())

    def _head_gradient(self, norm: nn.Module, output: nn.Linear, hidden: Tensor, part: slice) -> Tensor:
        """The loss's gradient at the trunk's last hidden states [rows, tokens, hidden] of some rows."""
        predicted = self.rows.predicted[part]
        x = norm(hidden)[torch.from_numpy(predicted).to(hidden.device)]
        logits = output(x)
        with torch.no_grad():  # the cross-entropy's gradient: probabilities, less one for the label
            at_logits = logits.softmax(-1)
            labels = draw_labels(at_logits, np.nonzero(predicted)[0] + part.start, self._seed)
            at_logits[torch.arange(len(labels), device=labels.device), labels] -= 1.0
        name = self._reader.name_of("lm_head.weight")
        self._show(name, 0, self._places[part][predicted], x.detach(), at_logits)
        (gradient,) = torch.autograd.grad(logits, hidden, at_logits)
        return gradient

    def _run_layer(self, layer: Layer) -> None:
        if layer.index >= (self.folder.first_states() or 0):
            self._meter.skip(layer.index)
            return
        module = self._reader.layer(layer)
        above = self.folder.states(layer.index + 1)
        with ExitStack() as files:
            below = files.enter_context(self.folder.writing_states(layer.index))
            experts = self._run_experts(module, above, files) if layer.is_moe else None
            for part in row_slices(self.rows, CHUNK_TOKENS):
                below[part] = self._run_rows(module, part, above[part], experts).cpu().numpy()
                self._meter.add(layer.index, row_cost(module) * int(self.rows.text[part].sum()))
            self.folder.write_found(layer.index, self._take())
        self.folder.drop_states(layer.index + 1)

    @torch.no_grad()
    def _run_experts(self, module: DecoderLayer, above: Floats, files: ExitStack) -> _ExpertGradients:
        """What comes back through the routed experts of a layer."""
        layer, shape = module.spec, (self.rows.text.size, self.hp.hidden_size)
        normed = files.enter_context(self.folder.scratch("normed", shape))
        at_normed = files.enter_context(self.folder.scratch("at-normed", shape))
        routes = Routes([self._route(module, part, normed) for part in self._parts()], self.rows.text)
        at_weights = np.zeros(self.rows.text.size * routes.n_used, np.float32)
        for part in self.stream.expert_parts(layer.index, routes):
            x, g = (self._reader.to_device(values[part.places]) for values in (normed, above.reshape(shape)))
            at_input, at_weights[part.slots] = self._run_expert(module, part, x, g)
            at_normed[part.places] += at_input
            self._meter.add(layer.index, part.cost)
        return _ExpertGradients(at_normed.reshape(above.shape), at_weights.reshape(*above.shape[:2], -1))

    def _route(self, module: DecoderLayer, part: slice, normed: Floats) -> tuple[Tensor, Tensor]:
        """The experts' ids and weights for the tokens of some rows; what experts read is written into normed."""
        x = self._input(module, part)
        y = module.post_attention_layernorm(module.attend(x, self._mask(module, part))).flatten(0, 1)
        normed[self._places[part].reshape(-1)] = y.cpu().numpy()
        ids, weights = module.moe.route(y)
        return ids.cpu(), weights.cpu()

    def _run_expert(self, module: DecoderLayer, part: ExpertPart, x: Tensor, g: Tensor) -> tuple[Floats, Floats]:
        """From gradients g at the layer's output those at the expert's inputs x, and at its router's weights."""
        with torch.enable_grad():
            products = run_expert(part.matrices, x.requires_grad_(), module.moe.clamp)
        (_, gated), (_, raised), (hidden, result) = products
        at_result = g * self._reader.to_device(part.weights)[:, None]
        at_input, *at_halves = torch.autograd.grad(result, [x, gated, raised], at_result)
        inputs, gradients = (x, x, hidden), (*at_halves, at_result)
        for role, seen, gradient in zip(EXPERT_ROLES, inputs, gradients, strict=True):
            self._show(expert_name(module.spec.index, role), part.expert, part.places, seen.detach(), gradient)
        return at_input.cpu().numpy(), (g * result.detach()).sum(-1).cpu().numpy()

    def _run_rows(self, module: DecoderLayer, part: slice, above: Floats, experts: _ExpertGradients | None) -> Tensor:
        """The gradient at what enters a layer, for some rows: through all of it but the routed experts."""
        x = self._input(module, part).requires_grad_()
        with self._watching(module, part):
            attended = module.attend(x, self._mask(module, part))
            y = module.post_attention_layernorm(attended)
            outputs = [attended + (module.mlp(y) if experts is None else module.share_expert(y))]
            gradients = [above]
            if experts is not None:
                outputs += [y, module.moe.route(y.flatten(0, 1))[1]]
                gradients += [experts.at_normed[part], experts.at_weights[part].reshape(-1, module.moe.n_used)]
            (below,) = torch.autograd.grad(outputs, x, [self._reader.to_device(values) for values in gradients])
        return below

    def _run_embedding(self) -> None:
        if self.folder.read_found(EMBEDDING) is not None:
            return
        gradients, text = self.folder.states(0), self.rows.text
        for part in self._parts():
            for observer in self._observers:
                at_embedding = self._reader.to_device(gradients[part][text[part]])
                observer.add_embedding(self.rows.tokens[part][text[part]], at_embedding)
        self.folder.write_found(EMBEDDING, self._take())

    @contextmanager
    def _watching(self, module: DecoderLayer, part: slice) -> Iterator[None]:
        """Shows the observers the gradients that come to the products of a layer, for some rows."""
        text = self.rows.text[part].reshape(-1)
        places, kept = self._places[part].reshape(-1)[text], torch.from_numpy(text).to(self._reader.device)

        def watch(name: TensorName) -> Callable[[nn.Module, Any, Tensor], None]:
            def catch(module: nn.Module, args: Any, y: Tensor) -> None:
                x = args[0].detach()

                def show(g: Tensor) -> None:
                    self._show(name, 0, places, x.flatten(0, -2)[kept], g.flatten(0, -2)[kept])

                y.register_hook(show)  # type: ignore[no-untyped-call]

            return catch

        paths = product_modules(module, module.spec) if self._observers else {}
        hooks = [
            child.register_forward_hook(watch(self._reader.name_of(f"{path}.weight"))) for path, child in paths.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _input(self, module: DecoderLayer, part: slice) -> Tensor:
        return self._reader.to_device(self.stream.folder.states(module.spec.index)[part])

    def _mask(self, module: DecoderLayer, part: slice) -> Tensor:
        return layer_mask(self.hp, module.spec, self.rows, part, self._reader.device)

    def _parts(self) -> Iterator[slice]:
        return row_slices(self.rows, CHUNK_TOKENS)

    def _show(self, name: TensorName, expert: int, places: NDArray[np.int64], x: Tensor, g: Tensor) -> None:
        for observer in self._observers if len(places) else ():  # rows of guard tokens predict nothing
            observer.add_product(name, expert, places, x, g)

    def _take(self) -> dict[str, NDArray[np.generic]]:
        return {f"{o.name}/{name}": array for o in self._observers for name, array in o.take().items()}


@dataclass(frozen=True, eq=False, slots=True)
class _ExpertGradients:
    """Gradients that come through a layer's routed experts.

    at_normed: at what they read, [rows, tokens, hidden]. at_weights: at the router's weights, [rows, tokens, n_used].
    """

    at_normed: Floats
    at_weights: Floats


def draw_labels(probabilities: Tensor, rows: NDArray[np.int64], seed: int) -> Tensor:
    """A label for each position, drawn from its probabilities [n, vocab]; rows [n]: the row of each, rising.

    A row's labels depend on the seed and its number alone, so that the same ones are drawn whatever runs beside it.
    """
    generator = torch.Generator(probabilities.device)
    drawn = []
    for row in np.unique(rows):
        start, stop = np.searchsorted(rows, [row, row + 1])
        generator.manual_seed(int(np.random.SeedSequence((seed, int(row))).generate_state(1)[0]))
        drawn.append(torch.multinomial(probabilities[start:stop], 1, generator=generator)[:, 0])
    return torch.cat(drawn) if drawn else torch.empty(0, dtype=torch.long, device=probabilities.device)
