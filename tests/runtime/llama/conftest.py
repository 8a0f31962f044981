"""Engines that end with their test, and a context without any cache to compare with."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from stepgguf.cli.main import main
from stepgguf.runtime.engine import Engine, Event, Finished, Request, Sampling, Stream, Tokens
from stepgguf.runtime.llama import LlamaEngine, LlamaOptions
from stepgguf.runtime.llama.context import DEFAULT_ATTENTION, DecodeRows, LlamaContext
from stepgguf.runtime.llama.model import LlamaModel
from stepgguf.runtime.placement import Attention, Placement
from tests.generate import Shape, write_checkpoint

GREEDY = Sampling(temperature=0.0)


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in F32, window 32, 3 MTP blocks: it babbles, and every token of the window matters.

    Each token uses every expert: which are chosen can then not hang by a hair, and logits are comparable closely.
    """
    folder = tmp_path_factory.mktemp("random")
    checkpoint = write_checkpoint(folder / "checkpoint", Shape(n_mtp=3, n_expert=4, n_used=4))
    assert main(["convert", str(checkpoint), str(folder / "f32.gguf"), "-t", "F32", "-q"]) == 0
    return folder / "f32.gguf"


class FreshContext:
    """A context that forgets everything before each prompt."""

    def __init__(self, path: Path, n_ctx: int, attention: Attention = DEFAULT_ATTENTION) -> None:
        self.model = LlamaModel(path, Placement(), mtp=False, mmap=True, progress=None)
        self.context = LlamaContext(
            self.model, n_ctx=n_ctx, n_seq=1, n_batch=512, n_outputs=1, threads=1, attention=attention
        )

    def logits(self, prompt: list[int]) -> np.ndarray:
        """After the prompt, [n_vocab]."""
        self.context.remove(0, 0)
        for start in range(0, len(prompt), 512):
            chunk = prompt[start : start + 512]
            assert self.context.decode([DecodeRows(0, start, chunk, 1)]) == 0
        return self.context.logits(len(chunk) - 1).astype(np.float64)

    def close(self) -> None:
        self.context.close()
        self.model.close()


@pytest.fixture
def start() -> Iterator[Callable[..., LlamaEngine]]:
    """Starts engines that end with the test."""
    engines: list[LlamaEngine] = []

    def start(path: Path, **options: object) -> LlamaEngine:
        engines.append(LlamaEngine(path, LlamaOptions(**{"threads": 1, **options})))  # type: ignore[arg-type]
        return engines[-1]

    yield start
    for engine in engines:
        engine.close()


def eventually(condition: Callable[[], bool], seconds: float = 10) -> bool:
    """Whether it comes true in so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def run(engine: Engine, prompt: list[int], sampling: Sampling = GREEDY, **more: object) -> tuple[list[int], Finished]:
    """The generated tokens of one request."""
    events = list(Stream(engine, Request(tuple(prompt), sampling, **more)))  # type: ignore[arg-type]
    return tokens_of(events), events[-1]  # type: ignore[return-value]


def tokens_of(events: list[Event]) -> list[int]:
    return [step.token_id for event in events if isinstance(event, Tokens) for step in event.steps]


def question(text: str, reasoning: str = "") -> str:
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n<think>\n{reasoning}"
