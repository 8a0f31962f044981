"""Going on from a cached prefix gives what a fresh run gives, and reads nothing twice."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from stepgguf.runtime.engine import Finished, Request, Stream, Tokens
from stepgguf.runtime.llama import LlamaEngine
from stepgguf.runtime.llama.sequences import ContextSequence, ContextSequences, StartPoint, common_prefix
from tests.runtime.llama.conftest import GREEDY, FreshContext, question, run

pytestmark = pytest.mark.slow

N_CTX = 2048  # the cache of the window of 32 keeps 32 * sequences + 512 positions: of 1,400 tokens most are gone

# A float16 cache filled in other batches moves the distribution by less than this (fresh runs with batches of 7 to 512
# differ by as much); reading window cells that are gone moves it by much more (the control below).
SAME = 0.001


def log_softmax(logits: np.ndarray) -> np.ndarray:
    values = logits.astype(np.float64)
    values -= values.max()
    return values - np.log(np.exp(values).sum())


def divergences(engine: LlamaEngine, fresh: FreshContext, seed: int, n_jumps: int) -> tuple[list[float], int, int]:
    """KL divergence from a fresh run after each of many jumps; tokens cached and in all."""
    rng = random.Random(seed)
    text = [rng.randrange(3, 700) for _ in range(1500)]
    result, cached, total = [], 0, 0
    for _ in range(n_jumps):
        n = rng.choice([rng.randrange(1, 1400), rng.randrange(600, 1400)])
        prompt = text[:n] + [rng.randrange(3, 700) for _ in range(rng.randrange(1, 20))]
        turns = tuple(sorted(rng.randrange(1, n + 1) for _ in range(3)))
        n_top = engine.info.n_vocab
        request = Request(
            tuple(prompt), GREEDY, rng.choice([1, 5, 40]), turns=turns, top_logprobs=n_top, ignore_end=True
        )
        events = list(Stream(engine, request))
        first = next(e for e in events if isinstance(e, Tokens)).steps[0]
        q = np.empty(engine.info.n_vocab)
        q[[t.token_id for t in first.top]] = [t.logprob for t in first.top]
        p = log_softmax(fresh.logits(prompt))
        result.append(float((np.exp(p) * (p - q)).sum()))
        finished = events[-1]
        assert isinstance(finished, Finished)
        cached, total = cached + finished.timings.n_cached, total + len(prompt)
    return result, cached, total


@pytest.mark.parametrize(("n_parallel", "mtp"), [(1, False), (3, False), (2, True)])
def test_going_on_from_any_position_gives_what_a_fresh_run_gives(
    random_model: Path, start: Callable[..., LlamaEngine], n_parallel: int, mtp: bool
) -> None:
    engine, fresh = (
        start(random_model, n_ctx=N_CTX, n_parallel=n_parallel, draft=3 if mtp else 0),
        FreshContext(random_model, N_CTX),
    )
    result, cached, total = divergences(engine, fresh, n_parallel, 40)
    fresh.close()
    assert max(result) < SAME
    assert cached > total / 4, "too little was reused: the test says little"


def test_without_the_check_the_same_jumps_corrupt(
    random_model: Path, start: Callable[..., LlamaEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    def naive(self: ContextSequences, sequence: ContextSequence, prompt: np.ndarray) -> StartPoint:
        return StartPoint(common_prefix(sequence.tokens, prompt[:-1]))

    monkeypatch.setattr(ContextSequences, "start_point", naive)
    engine, fresh = start(random_model, n_ctx=N_CTX, n_parallel=1, draft=0), FreshContext(random_model, N_CTX)
    result, _, _ = divergences(engine, fresh, 1, 20)
    fresh.close()
    assert max(result) > 4 * SAME


@pytest.mark.parametrize("mtp", [False, True])
def test_ten_turns_read_only_what_is_new(demo_gguf: Path, start: Callable[..., LlamaEngine], mtp: bool) -> None:
    """The template drops the reasoning of earlier turns, so each prompt departs from the last one where its answer
    began. Only what follows is read: the answer without reasoning, the next question, the opening of the answer."""
    engine = start(demo_gguf, n_ctx=4096, n_parallel=2, draft=3 if mtp else 0)
    opening = engine.token_id("<|im_start|>")
    history, known = "", 0
    for turn in range(10):
        text = question(f"What is {turn}{turn + 1} + {3 * turn}?")
        prompt = engine.tokenize(history + text)
        turns = tuple(i for i, token in enumerate(prompt) if token == opening)
        tokens, finished = run(engine, prompt, turns=turns)
        assert finished.timings.n_cached >= known, f"turn {turn}"
        known = turns[-1]
        if mtp and turn:
            assert sum(finished.timings.drafted) > 0, "no drafts on a cached turn"
        answer = b"".join(engine.piece(t) for t in tokens).decode().split("</think>\n")[1]
        history += text.removesuffix("<think>\n") + answer + "<|im_end|>\n"


def test_a_tool_loop_reads_only_the_tool_result(demo_gguf: Path, start: Callable[..., LlamaEngine]) -> None:
    """Within a turn the template keeps the reasoning, so the next prompt is a continuation."""
    engine = start(demo_gguf, n_ctx=4096, n_parallel=1)
    prompt = engine.tokenize(question("What is 347 + 286?"))
    tokens, _ = run(engine, prompt)
    more = engine.tokenize_piece("<|im_end|>\n<|im_start|>user\nThanks<|im_end|>\n")
    _, finished = run(engine, prompt + tokens + more)
    assert finished.timings.n_cached >= len(prompt) + len(tokens) - 1


def test_two_conversations_with_one_beginning_do_not_disturb_each_other(
    demo_gguf: Path, start: Callable[..., LlamaEngine]
) -> None:
    engine = start(demo_gguf, n_ctx=4096, n_parallel=2)
    system = "<|im_start|>system\n" + "Be brief. " * 150 + "<|im_end|>\n"
    prompts = [engine.tokenize(system + question(f"What is 12{i} + 345?")) for i in range(2)]
    at = len(engine.tokenize(system))
    alone = [run(engine, prompt, turns=(at,))[0] for prompt in prompts]
    _, second = run(engine, prompts[1], turns=(at,))
    assert second.timings.n_cached > at
    tokens, first = run(engine, prompts[0], turns=(at,))
    assert first.timings.n_cached > at, "the second conversation has taken the first one's place"
    assert tokens == alone[0]


def test_idle_conversations_come_back_from_ram(demo_gguf: Path, start: Callable[..., LlamaEngine]) -> None:
    engine = start(demo_gguf, n_ctx=4096, n_parallel=1)
    prompts = [engine.tokenize(question(f"What is {i}12 + 345?") * 3) for i in range(4)]
    answers = [run(engine, prompt)[0] for prompt in prompts]
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens, finished = run(engine, prompt)
        assert tokens == answer
        assert finished.timings.n_cached >= len(prompt) - 4
    assert 0 < engine.stats().cache_bytes < 2 * 2**30


def test_without_ram_nothing_is_kept_and_everything_works(demo_gguf: Path, start: Callable[..., LlamaEngine]) -> None:
    engine = start(demo_gguf, n_ctx=4096, n_parallel=1, cache_ram=0)
    prompts = [engine.tokenize(question(f"What is {i}12 + 345?") * 3) for i in range(2)]
    answers = [run(engine, prompt)[0] for prompt in prompts]
    for prompt, answer in zip(prompts, answers, strict=True):
        assert run(engine, prompt)[0] == answer
    assert engine.stats().cache_bytes == 0


def test_conversations_are_found_again_on_disk_after_a_restart(
    demo_gguf: Path, start: Callable[..., LlamaEngine], tmp_path: Path
) -> None:
    first = start(demo_gguf, n_ctx=4096, cache_folder=tmp_path)
    prompt = first.tokenize(question("What is 112 + 345?") * 3)
    answer, _ = run(first, prompt)
    first.close()
    files = list(tmp_path.rglob("*.npz"))
    assert len(files) == 1
    assert files[0].stat().st_mode & 0o077 == 0, "others can read what was said"
    second = start(demo_gguf, n_ctx=4096, cache_folder=tmp_path)
    tokens, finished = run(second, prompt)
    assert tokens == answer
    assert finished.timings.n_cached >= len(prompt) - 4


def test_a_damaged_file_of_the_disk_cache_is_not_used(
    demo_gguf: Path, start: Callable[..., LlamaEngine], tmp_path: Path
) -> None:
    first = start(demo_gguf, n_ctx=4096, cache_folder=tmp_path)
    prompt = first.tokenize(question("What is 112 + 345?") * 3)
    answer, _ = run(first, prompt)
    first.close()
    (file,) = tmp_path.rglob("*.npz")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0xFF
    file.write_bytes(data)
    tokens, finished = run(start(demo_gguf, n_ctx=4096, cache_folder=tmp_path), prompt)
    assert tokens == answer
    assert finished.timings.n_cached == 0
