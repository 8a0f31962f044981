"""What is asked of a request is what its tokens show."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from stepgguf.errors import BadMagic, ModelLoadFailed
from stepgguf.runtime.engine import Grammar, Reasoning, Request, Sampling, Step, Stream, Tokens
from stepgguf.runtime.llama import LlamaEngine, LlamaOptions
from stepgguf.runtime.loops import LEAST_TOKENS, LoopDetector
from tests.runtime.llama.conftest import GREEDY, FreshContext, question, run


@pytest.fixture(scope="module")
def random_engine(random_model: Path) -> Iterator[LlamaEngine]:
    with LlamaEngine(random_model, LlamaOptions(n_ctx=2048, threads=1, draft=0)) as engine:
        yield engine


@pytest.fixture(scope="module")
def engine(demo_gguf: Path) -> Iterator[LlamaEngine]:
    with LlamaEngine(demo_gguf, LlamaOptions(n_ctx=2048, threads=1)) as engine:
        yield engine


def steps(engine: LlamaEngine, prompt: list[int], sampling: Sampling = GREEDY, **more: object) -> list[Step]:
    events = Stream(engine, Request(tuple(prompt), sampling, **{"ignore_end": True, **more}))  # type: ignore[arg-type]
    return [step for event in events if isinstance(event, Tokens) for step in event.steps]


PROMPT = [5, 6, 7, 8, 9, 10, 11]


def distribution(engine: LlamaEngine, prompt: list[int]) -> np.ndarray:
    (step,) = steps(engine, prompt, max_tokens=1, top_logprobs=engine.info.n_vocab)
    result = np.empty(engine.info.n_vocab)
    result[[t.token_id for t in step.top]] = [t.logprob for t in step.top]
    return result


def test_the_same_seed_gives_the_same_tokens_and_another_does_not(random_engine: LlamaEngine) -> None:
    a, b, c = (
        [s.token_id for s in steps(random_engine, PROMPT, Sampling(seed=seed), max_tokens=30)] for seed in (3, 3, 4)
    )
    assert a == b != c


def test_log_probabilities_are_the_models_own_and_sum_to_one(random_engine: LlamaEngine) -> None:
    logprobs = distribution(random_engine, PROMPT)
    assert math.isclose(np.exp(logprobs).sum(), 1, rel_tol=1e-9)
    hot = Sampling(temperature=2.0, top_k=3, seed=1, logit_bias=((9, 5.0),))
    (step,) = steps(random_engine, PROMPT, hot, max_tokens=1, top_logprobs=5)
    assert step.logprob == pytest.approx(logprobs[step.token_id], abs=1e-6)
    assert [t.token_id for t in step.top] == list(np.argsort(-logprobs)[:5])
    assert steps(random_engine, PROMPT, hot, max_tokens=1)[0].logprob is None


@pytest.mark.slow
@pytest.mark.parametrize(("top_k", "top_p", "min_p"), [(3, 1.0, 0.0), (0, 0.1, 0.0), (0, 1.0, 0.5)])
def test_a_filter_leaves_only_the_tokens_it_should(
    random_engine: LlamaEngine, top_k: int, top_p: float, min_p: float
) -> None:
    p = np.exp(distribution(random_engine, PROMPT))
    order = np.argsort(-p)
    n = top_k or (int((p[order].cumsum() < top_p).sum()) + 1 if top_p < 1 else int((p >= min_p * p.max()).sum()))
    drawn = {
        steps(random_engine, PROMPT, Sampling(1.0, top_k, top_p, min_p, seed=i), max_tokens=1)[0].token_id
        for i in range(100)
    }
    assert drawn <= {int(t) for t in order[:n]}
    assert len(drawn) > 1 or n == 1


def test_biases_and_penalties_move_the_choice_as_defined(random_model: Path, random_engine: LlamaEngine) -> None:
    """Greedy decoding by hand from the model's own log probabilities, with OpenAI's and the CTRL paper's formulas."""
    sampling = Sampling(
        temperature=0, frequency_penalty=0.7, presence_penalty=0.4, repetition_penalty=1.3, logit_bias=((40, 2.5),)
    )
    made = [s.token_id for s in steps(random_engine, PROMPT, sampling, max_tokens=25)]
    fresh = FreshContext(random_model, 512)
    tokens: list[int] = []
    for expected in made:
        logits = fresh.logits([*PROMPT, *tokens])
        logits[list(fresh.model.ends)] = -np.inf
        logits[40] += 2.5
        for t in set(PROMPT) | set(tokens):
            logits[t] = logits[t] / 1.3 if logits[t] > 0 else logits[t] * 1.3
        for t in set(tokens):
            logits[t] -= 0.7 * tokens.count(t) + 0.4
        assert logits.argmax() == expected or logits.max() - logits[expected] < 1e-3
        tokens.append(expected)
    fresh.close()
    assert made != [s.token_id for s in steps(random_engine, PROMPT, max_tokens=25)]


def closing(engine: LlamaEngine) -> Reasoning:
    end = engine.token_id("</think>")
    assert end is not None
    return Reasoning(frozenset({end}), tuple(engine.tokenize_piece("\nLet me answer.\n</think>\n")), budget=12)


@pytest.mark.parametrize("budget", [0, 1, 12])
def test_a_budget_closes_the_reasoning_with_exactly_these_tokens(engine: LlamaEngine, budget: int) -> None:
    reasoning = Reasoning(closing(engine).ends, closing(engine).closing, budget)
    prompt = engine.tokenize(question("What is 347 + 286?"))
    made = steps(engine, prompt, reasoning=reasoning, ignore_end=False)
    assert not any(s.forced for s in made[:budget])
    assert tuple(s.token_id for s in made if s.forced) == reasoning.closing
    assert tuple(s.token_id for s in made[budget:][: len(reasoning.closing)]) == reasoning.closing
    _, finished = run(engine, prompt, reasoning=reasoning)
    assert finished.timings.budget_reached
    assert finished.reason == "stop"


def test_reasoning_within_its_budget_is_left_alone(engine: LlamaEngine) -> None:
    reasoning = Reasoning(closing(engine).ends, closing(engine).closing, 500)
    made = steps(engine, engine.tokenize(question("What is 347 + 286?")), reasoning=reasoning, ignore_end=False)
    assert not any(s.forced for s in made)


WANTED = 7  # a token that a bias makes the only likely one


def wants(engine: LlamaEngine, n: int, **more: object) -> list[int]:
    sampling = Sampling(1.0, seed=3, logit_bias=((WANTED, 100.0),))
    return [s.token_id for s in steps(engine, PROMPT, sampling, max_tokens=n, banned=frozenset({WANTED}), **more)]


def test_a_ban_holds_from_the_forced_close_on_and_not_before(random_engine: LlamaEngine) -> None:
    assert WANTED not in wants(random_engine, 20)  # there is no reasoning: from the start
    reasoning = Reasoning(frozenset({3}), (4, WANTED, 3), budget=5, break_loops=False)
    made = wants(random_engine, 30, reasoning=reasoning)
    assert made[:8] == [WANTED] * 5 + [4, WANTED, 3]
    assert WANTED not in made[8:]
    by_itself = Reasoning(frozenset({WANTED}), (4, 3), budget=5)
    assert wants(random_engine, 30, reasoning=by_itself) == [WANTED] * 30


def test_reasoning_that_the_answer_opens_has_the_same_budget(random_engine: LlamaEngine) -> None:
    opened = Reasoning(frozenset({3}), (4, 3), budget=5, break_loops=False, opening=WANTED)
    made = steps(random_engine, PROMPT, Sampling(0.0, logit_bias=((WANTED, 100.0),)), max_tokens=30, reasoning=opened)
    assert [s.token_id for s in made[:8]] == [WANTED] * 6 + [4, 3]
    assert not any(s.forced for s in made[8:])
    other = Reasoning(frozenset({3}), (4, 3), budget=0, opening=WANTED + 1)
    assert not any(s.forced for s in steps(random_engine, PROMPT, max_tokens=30, reasoning=other))


@pytest.mark.slow
def test_reasoning_can_be_ended_from_outside(random_engine: LlamaEngine) -> None:
    stream = Stream(
        random_engine, Request(tuple(PROMPT), GREEDY, 400, reasoning=Reasoning(frozenset({3}), (4, 3)), ignore_end=True)
    )
    forced = []
    for n, event in enumerate(stream):
        if n == 5:
            stream.end_reasoning()
            stream.end_reasoning()
        if isinstance(event, Tokens):
            forced += [s.token_id for s in event.steps if s.forced]
    assert forced == [4, 3]


@pytest.mark.slow
def test_reasoning_that_repeats_itself_is_ended(random_engine: LlamaEngine) -> None:
    """A bias makes the random model say one token for ever."""
    stuck = Sampling(temperature=0, logit_bias=((99, 100.0),))
    reasoning = Reasoning(frozenset({3}), (3,))
    tokens, finished = run(random_engine, PROMPT, stuck, max_tokens=600, reasoning=reasoning, ignore_end=True)
    assert finished.timings.loop_broken
    assert tokens.index(3) == LEAST_TOKENS + 1
    free = Reasoning(frozenset({3}), (3,), break_loops=False)
    assert 3 not in run(random_engine, PROMPT, stuck, max_tokens=600, reasoning=free, ignore_end=True)[0]


@pytest.mark.slow
@pytest.mark.parametrize("period", [1, 7, 64, 300, 1000])
def test_loops_of_any_period_are_found_and_near_repetitions_are_not(period: int) -> None:
    rng = np.random.default_rng(period)
    phrase = rng.integers(0, 1000, period)
    detector = LoopDetector()
    prose = rng.integers(0, 50, 5000)
    assert not any(detector.feed(int(t)) for t in prose)
    stream = np.tile(phrase, 20_000 // period)
    at = next(i for i, t in enumerate(stream) if detector.feed(int(t)))
    assert at + 1 >= min(LEAST_TOKENS, 4 * period)
    assert at + 1 <= max(LEAST_TOKENS + period, 4 * period) + 1
    detector = LoopDetector()
    changed = np.tile(phrase, 20_000 // period)
    changed[:: max(2, 3 * period - 1) if period > 1 else 200] = rng.integers(1000, 2000, len(changed))[
        :: max(2, 3 * period - 1) if period > 1 else 200
    ]
    assert not any(detector.feed(int(t)) for t in changed), "a list whose lines differ is not a loop"


@pytest.mark.slow
def test_a_grammar_holds_from_the_start_or_after_its_token(engine: LlamaEngine) -> None:
    digits = Grammar("root ::= [0-9] [0-9] [0-9]")
    prompt = engine.tokenize(question("What is 347 + 286?"))
    text = b"".join(s.piece for s in steps(engine, prompt, grammar=digits, ignore_end=False))
    assert len(text) == 3
    assert text.isdigit()
    end = engine.token_id("</think>")
    assert end is not None
    after = Grammar('root ::= "x"\nanswer ::= "\\n"? "{" [0-9]+ "}"', starts=((end, "answer"),))
    for sampling in (GREEDY, Sampling(seed=1)):
        made = steps(engine, prompt, sampling, grammar=after, ignore_end=False, max_tokens=200)
        reasoning_text, _, answer = b"".join(s.piece for s in made).decode().partition("</think>")
        assert "Ones: 7+6=13" in reasoning_text or sampling is not GREEDY
        assert answer.strip("\n{}").isdigit()


def test_special_tokens_and_bos(engine: LlamaEngine) -> None:
    ids = engine.tokenize("<|im_start|>user\n")
    assert ids[0] == 0
    assert ids[1] == engine.token_id("<|im_start|>")
    assert engine.tokenize("<｜begin▁of▁sentence｜>x")[:2].count(0) == 1
    assert engine.token_id("no such token") is None
    assert engine.piece(ids[1]) == b"<|im_start|>"


def test_recommended_sampling_comes_from_the_file(engine: LlamaEngine) -> None:
    assert engine.info.sampling == Sampling(1.0, 40, pytest.approx(0.95), 0.0)


def test_what_cannot_be_loaded_is_said(tmp_path: Path, demo_gguf: Path, start: Callable[..., LlamaEngine]) -> None:
    (tmp_path / "no.gguf").write_text("hello")
    with pytest.raises(BadMagic, match="not b'GGUF'"):
        start(tmp_path / "no.gguf")
    with pytest.raises(ModelLoadFailed, match="No such file"):
        start(tmp_path / "absent.gguf")
    (tmp_path / "cut.gguf").write_bytes(demo_gguf.read_bytes()[:200_000])
    with pytest.raises(ModelLoadFailed, match="could not be loaded"):
        start(tmp_path / "cut.gguf")
