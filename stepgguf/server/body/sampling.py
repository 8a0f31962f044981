"""Fields that all dialects share, and what they mean to the engine: sampling, what ends an answer, its length.

Within a class they stand in the order of their use, as /docs shows them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from stepgguf.errors import RequestError
from stepgguf.runtime.engine import Sampling
from stepgguf.server.body.objects import CheckedObject

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Bias = Annotated[float, Field(ge=-100, le=100)]
UNLIMITED = -1  # llama.cpp's, LM Studio's, Ollama's
Tokens = Annotated[int, Field(ge=UNLIMITED)]
AnswerTokens = Annotated[int, Field(ge=1)] | Literal[-1]
RANDOM_SEED = -1  # llama.cpp's, LM Studio's
MOST_STOPS = 16  # each is looked for in every token's text
MOST_BIASED = 4096  # added to the logits for every token
GREEDY = 1e-3  # a temperature below makes logits overflow; the likeliest token it is in any case


def token_limit(tokens: int | None) -> int | None:
    """Return a number of tokens as the engine takes it: None, which is no limit, for -1."""
    return None if tokens == UNLIMITED else tokens


def _check_bias_size(bias: Any) -> Any:
    """Refuse too many biases before each of them is validated."""
    if isinstance(bias, (dict, list)) and len(bias) > MOST_BIASED:
        raise PydanticCustomError("too_long", "at most {most} tokens can have a bias", {"most": MOST_BIASED})
    return bias


class SamplingFields(CheckedObject):
    """How tokens are chosen. A field that is absent is as the model file says."""

    temperature: float | None = Field(None, ge=0, le=2, description="0 always takes the likeliest token.")
    stop: str | list[str] | None = Field(None, description=f"Up to {MOST_STOPS} texts that end the answer.")
    seed: int | None = Field(None, description="The same seed gives the same answer; -1 is a new one each time.")
    top_p: float | None = Field(None, ge=0, le=1, description="1 is off.")
    top_k: int | None = Field(None, ge=-1, description="0 and -1 are off.")
    min_p: float | None = Field(None, ge=0, le=1, description="0 is off.")
    frequency_penalty: float | None = Field(
        None, ge=-2, le=2, description="Taken off a token's logit for each time that the answer has it; 0 is off."
    )
    presence_penalty: float | None = Field(
        None, ge=-2, le=2, description="Taken off a token's logit if the answer has it; 0 is off."
    )
    repetition_penalty: float | None = Field(None, ge=0.01, le=2, description="1 is off.")
    repeat_penalty: float | None = Field(None, ge=0.01, le=2, description="llama.cpp's name of repetition_penalty.")
    logit_bias: Annotated[dict[str, Bias] | list[tuple[int, Bias]] | None, BeforeValidator(_check_bias_size)] = Field(
        None, description="Token ids and what is added to their logits.", examples=[{"271": -100}]
    )

    def sampling(self, default: Sampling, n_vocab: int) -> Sampling:
        """Return `default` with the fields that are sent. RequestError: a bias names a token that is not one of
        n_vocab."""
        given: dict[str, Any] = {
            "temperature": 0.0 if self.temperature is not None and self.temperature < GREEDY else self.temperature,
            "top_p": self.top_p,
            "top_k": None if self.top_k is None else max(0, self.top_k),
            "min_p": self.min_p,
            "frequency_penalty": self.frequency_penalty,
            "presence_penalty": self.presence_penalty,
            "repetition_penalty": self.repetition_penalty if self.repeat_penalty is None else self.repeat_penalty,
            "logit_bias": self._logit_bias_pairs(n_vocab),
            "seed": None if self.seed == RANDOM_SEED else self.seed,
        }
        return replace(default, **{name: value for name, value in given.items() if value is not None})

    def stop_texts(self) -> tuple[str, ...]:
        """Return the texts that end the answer. RequestError: they are more than MOST_STOPS."""
        texts = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(texts) > MOST_STOPS:
            raise RequestError(f"stop: at most {MOST_STOPS} texts, found {len(texts)}", param="stop")
        return tuple(text for text in texts if text)

    def _logit_bias_pairs(self, n_vocab: int) -> tuple[tuple[int, float], ...] | None:
        if self.logit_bias is None:
            return None
        pairs = self.logit_bias.items() if isinstance(self.logit_bias, dict) else self.logit_bias
        bias = {}
        for token, value in pairs:
            # A key of a JSON object is text. int() takes time in the square of its digits.
            if not str(token).isdecimal() or len(str(token)) > 9 or int(token) >= n_vocab:
                raise RequestError(
                    f"logit_bias: expected token ids from 0 to {n_vocab - 1}, found {token!r}",
                    param="logit_bias",
                    hint="POST /tokenize gives the ids of a text.",
                )
            bias[int(token)] = value
        return tuple(bias.items())
