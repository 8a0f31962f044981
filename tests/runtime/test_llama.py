"""The in-process engine on small models, for real."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from stepgguf.cli.main import main
from stepgguf.errors import BadMagic, ContextLengthExceeded, ModelLoadFailed
from stepgguf.runtime.engine import Sampling
from stepgguf.runtime.llama import LlamaEngine

GREEDY = Sampling(temperature=0.0)


@pytest.fixture(scope="module")
def model(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("engine") / "f32.gguf"
    assert main(["convert", str(small), str(path), "-t", "F32", "-q"]) == 0
    return path


def divergences_after_rollbacks(engine: LlamaEngine, fresh: LlamaEngine) -> tuple[list[float], int]:
    """KL divergence from a fresh run after each of 12 jumps, and how often something was reused."""
    rng = random.Random(0)
    tokens = [rng.randrange(3, 700) for _ in range(1500)]
    result, reused = [], 0
    for n in (1200, 1190, 700, 1400, 1380, 100, 90, 1000, 600, 999, 30, 1300):
        prompt = tokens[:n] + [rng.randrange(3, 700) for _ in range(rng.randrange(1, 20))]
        engine.read(prompt)
        reused += engine.n_cached > 0
        fresh._cached = []
        fresh.read(prompt)
        p, q = (torch.tensor(e.logits()).double().log_softmax(0) for e in (fresh, engine))
        result.append(float((p.exp() * (p - q)).sum()))
        for token in tokens[n : n + rng.choice([0, 5, 20])]:
            engine.decode([token])
    return result, reused


# A float16 cache filled in other batches, and experts chosen by a hair, move the distribution by less than this;
# reading window cells that are gone moves it by much more (the control below).
SAME = 0.005


def test_going_on_from_any_prefix_gives_what_a_fresh_run_gives(model: Path) -> None:
    """The cache keeps the window of 32 and a batch of 512: of 1,200 tokens the first 600 are gone."""
    with LlamaEngine(model, n_ctx=2048) as engine, LlamaEngine(model, n_ctx=2048) as fresh:
        result, reused = divergences_after_rollbacks(engine, fresh)
    assert max(result) < SAME
    assert reused > 3, "nothing was reused: the test says nothing"


def test_without_the_check_the_same_jumps_corrupt(model: Path) -> None:
    with LlamaEngine(model, n_ctx=2048) as engine, LlamaEngine(model, n_ctx=2048) as fresh:
        engine._reusable = lambda prompt: min(  # type: ignore[method-assign]
            len(prompt) - 1,
            next((i for i, (a, b) in enumerate(zip(engine._cached, prompt, strict=False)) if a != b), 0),
        )
        result, _ = divergences_after_rollbacks(engine, fresh)
    assert max(result) > 4 * SAME


def test_greedy_is_repeatable_and_a_seed_is_too(model: Path) -> None:
    with LlamaEngine(model, n_ctx=256) as engine:
        prompt = engine.tokenize("Hello")
        for sampling in (GREEDY, Sampling(seed=3)):
            a, b = ([s.token_id for s in engine.generate(prompt, sampling, 20)] for _ in range(2))
            assert a == b
        assert [s.token_id for s in engine.generate(prompt, Sampling(seed=4), 20)] != a


def test_forced_tokens_come_next(model: Path) -> None:
    with LlamaEngine(model, n_ctx=256) as engine:
        generation = engine.generate(engine.tokenize("Hello"), GREEDY, 6)
        seen = []
        for step in generation:
            seen.append((step.token_id, step.forced))
            if len(seen) == 2:
                generation.force([5, 6])
        assert [token for token, forced in seen if forced] == [5, 6]
        assert generation.finish_reason == "length"


def test_special_tokens_and_bos(model: Path) -> None:
    with LlamaEngine(model, n_ctx=256) as engine:
        ids = engine.tokenize("<|im_start|>user\n")
        assert ids[0] == 0
        assert ids[1] == engine.token_id("<|im_start|>")
        assert engine.tokenize("<｜begin▁of▁sentence｜>x")[:2].count(0) == 1
        assert engine.token_id("no such token") is None
        assert engine.piece(ids[1]) == b"<|im_start|>"


def test_a_prompt_that_does_not_fit_is_refused(model: Path) -> None:
    with LlamaEngine(model, n_ctx=256) as engine:
        with pytest.raises(ContextLengthExceeded, match="the prompt has 300 tokens, the context 256"):
            engine.generate([5] * 300, GREEDY)
        generation = engine.generate([5] * 250, GREEDY)
        assert len(list(generation)) <= 6
        assert generation.finish_reason in ("length", "stop")


def test_recommended_sampling_comes_from_the_file(model: Path) -> None:
    with LlamaEngine(model, n_ctx=256) as engine:
        assert engine.info.sampling.temperature == 1.0
        assert engine.info.sampling.top_k == 40
        assert engine.info.sampling.top_p == pytest.approx(0.95)
        assert engine.info.sampling.min_p == 0.0


def test_what_cannot_be_loaded_is_said(tmp_path: Path, model: Path) -> None:
    (tmp_path / "no.gguf").write_text("hello")
    with pytest.raises(BadMagic, match="not b'GGUF'"):
        LlamaEngine(tmp_path / "no.gguf")
    with pytest.raises(ModelLoadFailed, match="No such file"):
        LlamaEngine(tmp_path / "absent.gguf")
    (tmp_path / "cut.gguf").write_bytes(model.read_bytes()[:-100000])
    with pytest.raises(ModelLoadFailed, match="could not be loaded"):
        LlamaEngine(tmp_path / "cut.gguf")
    data = model.read_bytes()
    (tmp_path / "arch.gguf").write_bytes(data.replace(b"step35", b"step99"))
    with pytest.raises(ModelLoadFailed, match="unknown model architecture: 'step99'"):
        LlamaEngine(tmp_path / "arch.gguf")


def test_a_context_that_does_not_fit_in_memory_says_what_to_do(model: Path) -> None:
    with pytest.raises(ModelLoadFailed, match=r"a context of .* tokens could not be made") as caught:
        LlamaEngine(model, n_ctx=2**31)
    assert "smaller --ctx" in (caught.value.hint or "")
