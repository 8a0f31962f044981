"""What a request says about sampling, as the body of POST /completion.

Everything that llama-server has another default for is written out, and its samplers stand in our order:
bias, penalties, grammar, top_k, top_p, min_p, temperature, draw.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from typing import Literal

from stepgguf.runtime.engine import Request
from stepgguf.runtime.llamaserver.client import Json
from stepgguf.runtime.llamaserver.vocabulary import ServerVocabulary

_SAMPLERS = ("penalties", "top_k", "top_p", "min_p", "temperature")
_ANSWER = ("stop", "stop_type", "truncated", "tokens_predicted", "timings")  # of the last event; it has the prompt too


def shared_settings(request: Request, vocabulary: ServerVocabulary, n_ctx: int) -> Json:
    """Return the part of the body of POST /completion that all completions of a request share."""
    sampling = request.sampling
    body: Json = {
        "cache_prompt": True,
        "return_tokens": True,
        "return_progress": True,
        "timings_per_token": True,
        "response_fields": _ANSWER,
        "samplers": _SAMPLERS,
        "temperature": sampling.temperature,
        "dynatemp_range": 0.0,
        "mirostat": 0,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "repeat_last_n": n_ctx,
        "repeat_penalty": sampling.repetition_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "presence_penalty": sampling.presence_penalty,
        "logit_bias": _biases(request),
        "ignore_eos": request.ignore_end,
        "n_probs": 0 if request.top_logprobs is None else max(1, request.top_logprobs),
        "post_sampling_probs": False,
    }
    if request.turns:  # llama-server saves states where user messages start, which it finds by their text
        start = request.prompt[request.turns[-1] :][:2]
        text = b"".join(map(vocabulary.piece, start)).decode()
        body["message_delimiters"] = [{"role": "user", "delimiter": text}]
    return body


def _biases(request: Request) -> list[tuple[int, float | Literal[False]]]:
    """Return the request's biases, and what takes back that llama-server's penalties count the prompt's tokens too.
    False is its word for a token that never comes.

    That is exact for the frequency penalty. A token of the prompt never gets the presence penalty, instead of getting
    it from its first use in the answer on.
    """
    sampling = request.sampling
    bias = defaultdict(float, sampling.logit_bias)
    if sampling.frequency_penalty or sampling.presence_penalty:
        for token, n in Counter(request.prompt).items():
            bias[token] += n * sampling.frequency_penalty + sampling.presence_penalty
    return [(token, value if value > -math.inf else False) for token, value in bias.items()]
