"""Drafting changes the speed and nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from stepgguf.errors import ModelLoadFailed
from stepgguf.runtime.engine import Sampling
from stepgguf.runtime.llama import LlamaEngine, LlamaOptions
from stepgguf.runtime.llama.depth import DepthTuner
from tests.runtime.llama.conftest import question, run

pytestmark = pytest.mark.slow

Start = Callable[..., LlamaEngine]
TEXTS = [question(f"What is {a} + {b}?") for a, b in ((347, 286), (12, 5), (999, 1), (450, 405))] + [
    question("How many 'r's are in the word strawberry?"),
    question("Hello"),
]


@pytest.fixture(scope="module")
def engines(demo_gguf: Path):  # type: ignore[no-untyped-def]
    with (
        LlamaEngine(demo_gguf, LlamaOptions(n_ctx=1024, threads=1, draft=3)) as with_mtp,
        LlamaEngine(demo_gguf, LlamaOptions(n_ctx=1024, threads=1, draft=0)) as without,
    ):
        assert (with_mtp.n_mtp, without.n_mtp) == (3, 0)
        yield with_mtp, without


@pytest.mark.parametrize("sampling", [Sampling(temperature=0.0), Sampling(seed=7), Sampling(temperature=1.5, seed=1)])
def test_the_text_is_the_same_with_and_without(engines: tuple[LlamaEngine, ...], sampling: Sampling) -> None:
    """Each token is the model's own choice, drawn with the same random numbers: a seed gives the same text too."""
    with_mtp, without = engines
    for text in TEXTS:
        prompt = with_mtp.tokenize(text)
        tokens, finished = run(with_mtp, prompt, sampling, max_tokens=150)
        assert tokens == run(without, prompt, sampling, max_tokens=150)[0]
        assert sum(finished.timings.drafted) > 0


def test_on_its_reasoning_the_embedded_model_makes_two_tokens_a_step(engines: tuple[LlamaEngine, ...]) -> None:
    engine = engines[0]
    before = engine.stats()
    n_tokens = n_steps = 0
    for n in range(20):
        _, finished = run(engine, engine.tokenize(question(f"What is {113 + 37 * n} + {951 - 29 * n}?")))
        n_tokens, n_steps = n_tokens + finished.timings.n_generated, n_steps + finished.timings.n_steps
    assert n_tokens / n_steps >= 2.0
    after = engine.stats()
    accepted = [(a - b) for a, b in zip(after.accepted, before.accepted, strict=True)]
    drafted = [(a - b) for a, b in zip(after.drafted, before.drafted, strict=True)]
    assert accepted[0] / drafted[0] > 0.8


def test_drafting_does_not_change_the_distribution(random_model: Path, start: Callable[..., LlamaEngine]) -> None:
    """The second token's distribution over 2,000 draws, by chi-squared, where drafts are mostly wrong."""
    draws = []
    for mtp in (True, False):
        engine = start(random_model, n_ctx=256, draft=3 if mtp else 0)
        sampling = [Sampling(temperature=1.0, top_k=4, top_p=1.0, seed=seed + 10_000 * mtp) for seed in range(1000)]
        prompt = [5, 6, 7, 8, 9, 10]
        draws.append(Counter(run(engine, prompt, s, max_tokens=3, ignore_end=True)[0][2] for s in sampling))
    common = [t for t in draws[0] | draws[1] if draws[0][t] + draws[1][t] >= 20]
    rest = [sum(n for t, n in d.items() if t not in common) for d in draws]
    cells = [(draws[0][t], draws[1][t]) for t in common] + ([tuple(rest)] if sum(rest) >= 20 else [])
    statistic = sum((a - b) ** 2 / (a + b) for a, b in cells)
    degrees = len(cells) - 1
    assert degrees >= 3
    # mean + 4 standard deviations of chi-squared: exceeded by chance about once in ten thousand
    assert statistic < degrees + 4 * (2 * degrees) ** 0.5


def test_the_tuner_finds_the_best_depth_and_notices_a_change() -> None:
    tuner = DepthTuner(3)

    def steps(n: int, tokens: dict[int, float], cost: dict[int, float]) -> Counter[int]:
        used: Counter[int] = Counter()
        for _ in range(n):
            depth = tuner.depth(1)
            used[depth] += 1
            tuner.record(1, depth, tokens[depth], cost[depth])  # type: ignore[arg-type]
        return used

    good = {0: 1.0, 1: 1.8, 2: 2.4, 3: 2.5}
    assert steps(400, good, {0: 1.0, 1: 1.2, 2: 1.4, 3: 1.8}).most_common(1)[0][0] == 2
    steps(600, {0: 1.0, 1: 1.0, 2: 1.0, 3: 1.0}, {0: 1.0, 1: 1.2, 2: 1.4, 3: 1.8})
    assert steps(200, {0: 1.0, 1: 1.0, 2: 1.0, 3: 1.0}, {0: 1.0, 1: 1.2, 2: 1.4, 3: 1.8}).most_common(1)[0][0] == 0
    steps(1000, good, {0: 1.0, 1: 1.2, 2: 1.4, 3: 1.8})
    assert steps(200, good, {0: 1.0, 1: 1.2, 2: 1.4, 3: 1.8}).most_common(1)[0][0] == 2
    assert tuner.depth(8) == 3, "another size of batch is tuned for itself"


def test_a_file_without_heads_runs(tmp_path: Path, start: Callable[..., LlamaEngine]) -> None:
    from stepgguf.cli.main import main
    from stepgguf.demo import CHECKPOINT

    assert main(["convert", str(CHECKPOINT), str(tmp_path / "trunk.gguf"), "-t", "BF16", "--mtp", "drop", "-q"]) == 0
    engine = start(tmp_path / "trunk.gguf", n_ctx=512)
    assert engine.n_mtp == 0
    assert run(engine, engine.tokenize(TEXTS[0]))[1].reason == "stop"


def test_heads_in_a_file_of_their_own_draft_the_same(demo_gguf: Path, separate_gguf: Path, start: Start) -> None:
    """The same tokens in the same steps, and as many guesses of each head are right."""
    together = start(demo_gguf, n_ctx=1024, draft=3)
    apart = start(separate_gguf, mtp_file=separate_gguf.with_name("mtp-demo.gguf"), n_ctx=1024, draft=3)
    assert apart.n_mtp == 3
    for text in TEXTS:
        prompt = together.tokenize(text)
        expected, got = (run(engine, prompt, max_tokens=150) for engine in (together, apart))
        assert got[0] == expected[0]
        for name in ("n_steps", "drafted", "accepted"):
            assert getattr(got[1].timings, name) == getattr(expected[1].timings, name)
        assert got[1].timings.accepted[0] > 0


def test_a_file_that_holds_no_heads_or_those_of_another_model_is_refused(
    demo_gguf: Path, separate_gguf: Path, random_model: Path
) -> None:
    with pytest.raises(ModelLoadFailed, match="holds no MTP blocks"):
        LlamaEngine(separate_gguf, LlamaOptions(mtp_file=separate_gguf, n_ctx=256, threads=1))
    with pytest.raises(ModelLoadFailed, match="is of another model"):
        LlamaEngine(separate_gguf, LlamaOptions(mtp_file=random_model, n_ctx=256, threads=1))
