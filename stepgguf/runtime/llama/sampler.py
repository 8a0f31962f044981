"""Sampler: logits to a token.

    logits + bias - penalties -> [grammar] -> top_k -> top_p -> min_p -> temperature -> draw

The filters and the draw are llama.cpp's samplers. Bias and penalties touch a few entries of the logits and are
written into them here: llama.cpp's penalties walk all 128,896 candidates. A grammar is asked about the drawn token
alone; only if it refuses, about all candidates, and the draw is made again (as llama.cpp's own tools do it).
"""

from __future__ import annotations

import ctypes
import secrets
import time
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any, cast

import llama_cpp
import numpy as np
import numpy.typing as npt

from stepgguf.errors import BadGrammar
from stepgguf.runtime.engine import Grammar, Logprob, Sampling
from stepgguf.runtime.llama.context import Floats, LlamaContext
from stepgguf.runtime.llama.model import LlamaModel

# A grammar whose parse states multiply would hold up every other request; a sane one needs milliseconds a token.
_SLOW_SECONDS = 2.0
_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])  # llama_token_data


class Sampler:
    """Chooses the tokens of one request: it holds its random numbers, its counts and its place in the grammar."""

    def __init__(
        self, model: LlamaModel, sampling: Sampling, prompt: Sequence[int], grammar: Grammar | None, *, ignore_end: bool
    ) -> None:
        """Compile the grammar. BadGrammar if that fails. ignore_end: never sample an end token."""
        self._model, self._sampling = model, sampling
        self._grammar = _GrammarState(model, grammar)
        self._chain = None if sampling.temperature <= 0 else _sampler_chain(sampling)  # None: the most likely token
        ends = sorted(model.ends) if ignore_end else []
        self._bias_ids = np.array([t for t, _ in sampling.logit_bias] + ends, np.int64)
        self._bias = np.array([b for _, b in sampling.logit_bias] + [-np.inf] * len(ends), np.float32)
        self._generated: Counter[int] = Counter()
        self._seen = set(prompt) if sampling.repetition_penalty != 1 else set()

    def ban(self, tokens: Collection[int]) -> None:
        """Bar these tokens from being sampled from now on, whatever the request's bias says."""
        self._bias_ids = np.append(self._bias_ids, np.array(sorted(tokens), np.int64))
        self._bias = np.append(self._bias, np.full(len(tokens), -np.inf, np.float32))

    def close(self) -> None:
        if self._chain is not None:
            llama_cpp.llama_sampler_free(self._chain)
            self._chain = None
        self._grammar.close()

    def sample(self, context: LlamaContext, row: int) -> int:
        """Return the next token after a row of the last decode. BadGrammar if the request's grammar takes too long."""
        logits = context.logits(row)
        self._add_biases_and_penalties(logits)
        if self._chain is None:
            token = int(logits.argmax())
        else:
            token = int(llama_cpp.llama_sampler_sample(self._chain, context.handle, row))
        return token if self._grammar.allows(token) else self._sample_allowed(logits)

    def accept(self, token: int) -> None:
        """Count a token that comes next, sampled or forced."""
        self._grammar.accept(token)
        if self._sampling.frequency_penalty or self._sampling.presence_penalty:
            self._generated[token] += 1
        if self._sampling.repetition_penalty != 1:
            self._seen.add(token)

    def _add_biases_and_penalties(self, logits: Floats) -> None:
        sampling = self._sampling
        # In this order, because the repetition penalty multiplies what it finds and the others only add.
        if self._bias_ids.size:
            logits[self._bias_ids] += self._bias
        if self._seen:
            ids = np.fromiter(self._seen, np.int64)
            values = logits[ids]
            factor = sampling.repetition_penalty
            logits[ids] = np.where(values > 0, values / factor, values * factor)
        if self._generated:
            ids = np.fromiter(self._generated.keys(), np.int64)
            counts = np.fromiter(self._generated.values(), np.float32)
            logits[ids] -= counts * sampling.frequency_penalty + sampling.presence_penalty

    def _sample_allowed(self, logits: Floats) -> int:
        """Draw again, from the tokens that the grammar allows. The first draw's random number is not given back."""
        candidates = np.empty(self._model.n_vocab, _CANDIDATE)
        candidates["id"], candidates["logit"], candidates["p"] = np.arange(self._model.n_vocab), logits, 0
        array = _token_array(candidates)
        self._grammar.apply(array)
        if not np.isfinite(candidates["logit"]).any():  # llama.cpp would throw at what is drawn now
            raise BadGrammar(
                "the grammar allows no token here", param="grammar", hint="Every rule needs a way to its end."
            )
        if self._chain is None:
            return int(candidates["id"][candidates["logit"].argmax()])
        llama_cpp.llama_sampler_apply(self._chain, ctypes.byref(array))
        token = int(candidates["id"][array.selected])
        llama_cpp.llama_sampler_accept(self._chain, token)
        return token


class _GrammarState:
    """The grammar that holds now and how far it has been parsed, or those that wait for their token."""

    def __init__(self, model: LlamaModel, grammar: Grammar | None) -> None:
        self._active: llama_cpp.llama_sampler_p | None = None
        self._waiting: dict[int, llama_cpp.llama_sampler_p] = {}
        if grammar is None:
            return
        if not grammar.starts:
            self._active = _compile_grammar(model, grammar.gbnf, "root")
        # Each is compiled now and not when its token comes: a grammar that is none must be refused before the answer.
        try:
            for token, rule in grammar.starts:
                self._waiting[token] = _compile_grammar(model, grammar.gbnf, rule)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        for compiled in (self._active, *self._waiting.values()):
            if compiled is not None:
                llama_cpp.llama_sampler_free(compiled)
        self._active, self._waiting = None, {}

    def allows(self, token: int) -> bool:
        """Whether the token may come next."""
        if self._active is None:
            return True
        candidates = np.array([(token, 0.0, 0.0)], _CANDIDATE)
        self.apply(_token_array(candidates))
        return bool(np.isfinite(candidates["logit"][0]))

    def apply(self, array: llama_cpp.llama_token_data_array) -> None:
        """Set the logits of all candidates that may not come next to -inf."""
        started = time.monotonic()
        llama_cpp.llama_sampler_apply(self._active, ctypes.byref(array))
        _refuse_if_slow(started)

    def accept(self, token: int) -> None:
        """Go on in the grammar, or start the one that waited for this token."""
        if self._active is not None:
            started = time.monotonic()
            llama_cpp.llama_sampler_accept(self._active, token)
            _refuse_if_slow(started)
        elif token in self._waiting:
            self._active = self._waiting.pop(token)


def logprobs_of(model: LlamaModel, logits: Floats, token: int, n_top: int) -> tuple[float, tuple[Logprob, ...]]:
    """Return the natural log of the model's probability of a token, and of its n_top most likely ones."""
    values = logits.astype(np.float64)
    values -= values.max()
    values -= np.log(np.exp(values).sum())
    if n_top == 0:
        return float(values[token]), ()
    best = np.argpartition(values, -n_top)[-n_top:]
    best = best[np.argsort(-values[best], kind="stable")]
    return float(values[token]), tuple(Logprob(int(t), model.piece(int(t)), float(values[t])) for t in best)


def _compile_grammar(model: LlamaModel, gbnf: str, rule: str) -> llama_cpp.llama_sampler_p:
    started = time.monotonic()
    compiled: llama_cpp.llama_sampler_p | None = llama_cpp.llama_sampler_init_grammar(
        model.vocab, gbnf.encode(), rule.encode()
    )
    if not compiled:
        raise BadGrammar(
            f"the grammar does not compile{model.log.last_errors()}",
            param="grammar",
            hint="It must be GBNF as llama.cpp reads it, without left recursion, with a rule named root.",
        )
    _refuse_if_slow(started)
    return compiled


def _refuse_if_slow(started: float) -> None:
    seconds = time.monotonic() - started
    if seconds > _SLOW_SECONDS:
        raise BadGrammar(
            f"the grammar needs {seconds:.1f} s for one token",
            param="grammar",
            hint="Make it unambiguous: every text should be readable in one way only.",
        )


def _sampler_chain(sampling: Sampling) -> llama_cpp.llama_sampler_p:
    """Return llama.cpp's filters and the draw at their end, in the order of this module's docstring."""
    params = llama_cpp.llama_sampler_chain_default_params()
    chain: llama_cpp.llama_sampler_p = llama_cpp.llama_sampler_chain_init(params)
    add = llama_cpp.llama_sampler_chain_add
    if sampling.top_k > 0:
        add(chain, llama_cpp.llama_sampler_init_top_k(sampling.top_k))
    if sampling.top_p < 1:
        add(chain, llama_cpp.llama_sampler_init_top_p(sampling.top_p, 1))
    if sampling.min_p > 0:
        add(chain, llama_cpp.llama_sampler_init_min_p(sampling.min_p, 1))
    add(chain, llama_cpp.llama_sampler_init_temp(sampling.temperature))
    seed = secrets.randbits(32) if sampling.seed is None else sampling.seed & 0xFFFFFFFF
    add(chain, llama_cpp.llama_sampler_init_dist(seed))
    return chain


def _token_array(candidates: npt.NDArray[np.void]) -> llama_cpp.llama_token_data_array:
    """Return the candidates as llama.cpp takes them. It points into them: they must stay alive as long."""
    array: Any = llama_cpp.llama_token_data_array()  # its annotations say arrays, where C has pointers
    array.data = candidates.ctypes.data_as(llama_cpp.llama_token_data_p)
    array.size, array.selected, array.sorted = len(candidates), -1, False
    return cast("llama_cpp.llama_token_data_array", array)
