"""The llama-server engine against llama.cpp's own server, as a process: see llama_server.py beside this file."""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stepgguf.errors import BadGrammar, ContextLengthExceeded, EngineBusy, EngineDied, EngineError, ModelLoadFailed
from stepgguf.runtime.engine import (
    Event,
    Finished,
    Grammar,
    Prefill,
    Queued,
    Reasoning,
    Request,
    Sampling,
    Step,
    Stream,
    Tokens,
)
from stepgguf.runtime.llamaserver import LlamaServerEngine, ServerOptions
from stepgguf.runtime.llamaserver.client import LlamaServerClient
from stepgguf.runtime.llamaserver.gbnf import with_start_rule
from stepgguf.runtime.llamaserver.process import RESTARTS
from stepgguf.runtime.placement import Attention, Placement

GREEDY = Sampling(temperature=0.0)
QUESTION = "<|im_start|>user\nHow many 'r's are in the word strawberry?<|im_end|>\n<|im_start|>assistant\n<think>\n"
ANSWER = b"</think>\nThere are 3 'r's."


@pytest.fixture(scope="module")
def binary(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A program llama-server, which leaves its process id beside it: see `last_started`."""
    path = tmp_path_factory.mktemp("bin") / "llama-server"
    program = f'exec "{sys.executable}" "{Path(__file__).parent / "llama_server.py"}" "$@"'
    path.write_text(f'#!/bin/sh\necho $$ > "$0.pid"\n{program}\n')
    path.chmod(0o755)
    return str(path)


def last_started(binary: str) -> int:
    """The process id of the llama-server that was started last."""
    return int(Path(f"{binary}.pid").read_text())


@pytest.fixture(scope="module")
def spawn(demo_gguf: Path, binary: str) -> Iterator[Callable[..., LlamaServerEngine]]:
    """Starts engines; all of them are closed in the end."""
    engines = []

    def start(path: Path = demo_gguf, **changed: Any) -> LlamaServerEngine:
        options = ServerOptions(binary=binary, n_ctx=2048, n_parallel=2, placement=Placement(gpu_layers=0), threads=1)
        engines.append(LlamaServerEngine.spawn(path, replace(options, **changed), queue_limit=1))
        return engines[-1]

    yield start
    for engine in engines:
        engine.close()


@pytest.fixture(scope="module")
def engine(spawn: Callable[..., LlamaServerEngine]) -> LlamaServerEngine:
    return spawn()


@pytest.fixture(scope="module")
def prompt(engine: LlamaServerEngine) -> tuple[int, ...]:
    return tuple(engine.tokenize(QUESTION))


@pytest.fixture(scope="module")
def end(engine: LlamaServerEngine) -> int:
    token = engine.token_id("</think>")
    assert token is not None
    return token


def run(engine: LlamaServerEngine, request: Request) -> tuple[list[Step], Finished]:
    stream = Stream(engine, request)
    steps = [step for event in stream if isinstance(event, Tokens) for step in event.steps]
    assert stream.finished is not None
    return steps, stream.finished


def text(steps: list[Step]) -> bytes:
    return b"".join(step.piece for step in steps)


def long(prompt: tuple[int, ...]) -> Request:
    """It does not end for a second or more."""
    return Request(prompt, GREEDY, ignore_end=True)


def eventually(condition: Callable[[], bool]) -> bool:
    """Within five seconds."""
    for _ in range(100):
        if condition():
            return True
        time.sleep(0.05)
    return False


def children() -> set[int]:
    """The process ids of our child processes."""
    command = ["ps", "-A", "-o", "pid=,ppid=,comm="]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    processes = (line.split(maxsplit=2) for line in listed.splitlines())
    return {int(pid) for pid, parent, name in processes if int(parent) == os.getpid() and name != "ps"}


def is_gone(pid: int) -> bool:
    """Also if nobody has asked yet for its exit code."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return not state.strip() or state.startswith("Z")


# what the model is --------------------------------------------------------------------------------------------------


def test_it_says_what_the_model_is(engine: LlamaServerEngine) -> None:
    info = engine.info
    assert (info.name, info.n_ctx, info.n_ctx_train, info.n_vocab) == ("demo", 2048, 4096, 768)
    assert info.sampling == Sampling(), "what the file recommends"
    assert info.chat_template is not None
    assert "<|im_start|>" in info.chat_template
    assert info.engine.startswith("llama-server b")


def test_special_tokens_and_bos(engine: LlamaServerEngine) -> None:
    ids = engine.tokenize("<|im_start|>user\n")
    assert ids[0] == 0
    assert ids[1] == engine.token_id("<|im_start|>")
    assert engine.tokenize("<｜begin▁of▁sentence｜>x")[:2].count(0) == 1
    assert engine.tokenize_piece("x") == engine.tokenize("x")[1:]
    plain = engine.tokenize_plain("<|im_start|>")
    assert b"".join(map(engine.piece, plain)) == b"<|im_start|>"
    assert ids[1] not in plain
    assert engine.token_id("no such token") is None
    assert engine.piece(ids[1]) == b"<|im_start|>"


# one answer ---------------------------------------------------------------------------------------------------------


def test_it_answers(engine: LlamaServerEngine, prompt: tuple[int, ...]) -> None:
    steps, finished = run(engine, Request(prompt, GREEDY))
    assert text(steps).endswith(ANSWER)
    assert finished.reason == "stop"
    assert finished.timings.n_generated == len(steps) == len(engine.tokenize_piece(text(steps).decode()))


def test_events_come_in_order_and_the_cache_is_told(engine: LlamaServerEngine, prompt: tuple[int, ...]) -> None:
    run(engine, Request(prompt, GREEDY, turns=(1,)))
    seen: list[Event] = list(Stream(engine, Request(prompt, GREEDY, turns=(1,))))
    kinds = [type(event) for event in seen]
    assert kinds == sorted(kinds, key=[Prefill, Tokens, Finished].index)
    assert kinds.count(Finished) == 1
    prefills = [event for event in seen if isinstance(event, Prefill)]
    assert prefills[-1].n_done == prefills[-1].n_prompt == len(prompt)
    assert isinstance(seen[-1], Finished)
    assert seen[-1].timings.n_cached == prefills[-1].n_cached > 0


@pytest.mark.slow
def test_max_tokens_and_the_context_end_an_answer(engine: LlamaServerEngine, prompt: tuple[int, ...]) -> None:
    steps, finished = run(engine, Request(prompt, GREEDY, max_tokens=7))
    assert (len(steps), finished.reason) == (7, "length")
    full = (*prompt, *(prompt[1],) * (2040 - len(prompt)))
    steps, finished = run(engine, Request(full, GREEDY, ignore_end=True))
    assert finished.reason == "length"
    assert 6 <= len(steps) <= 8
    with pytest.raises(ContextLengthExceeded):
        engine.submit(Request((5,) * 2048), lambda event: None)


def test_the_same_seed_gives_the_same_tokens(engine: LlamaServerEngine, prompt: tuple[int, ...]) -> None:
    def ids(seed: int) -> list[int]:
        return [s.token_id for s in run(engine, Request(prompt, Sampling(2.5, 0, 1.0, seed=seed), max_tokens=20))[0]]

    assert ids(3) == ids(3) != ids(4)


def test_characters_of_several_tokens_come_whole(engine: LlamaServerEngine, prompt: tuple[int, ...]) -> None:
    """llama-server makes no event for a token that ends inside a character."""
    steps, _ = run(engine, Request(prompt, GREEDY, grammar=Grammar('root ::= "a\u00e9\U0001f600z"')))
    assert text(steps) == "a\u00e9\U0001f600z".encode()
    assert [step.token_id for step in steps] == engine.tokenize_piece("a\u00e9\U0001f600z")
    assert [len(step.piece) for step in steps] == [1] * 8, "bytes, not characters"
    cut, finished = run(engine, Request(prompt, GREEDY, grammar=Grammar('root ::= "\U0001f600"'), max_tokens=2))
    assert (text(cut), finished.reason) == (b"", "length")


def test_penalties_do_not_count_the_prompt(engine: LlamaServerEngine) -> None:
    """The answer begins "Looking for r", which the prompt has too."""
    prompt = tuple(engine.tokenize("<|im_start|>system\nLooking for r.<|im_end|>\n" + QUESTION))
    for penalties in ({}, {"frequency_penalty": 20.0}, {"presence_penalty": 20.0}):
        steps, _ = run(engine, Request(prompt, Sampling(0.0, **penalties), max_tokens=3))
        assert text(steps) == b"Looking for r"
    biased = Sampling(0.0, frequency_penalty=2.0, logit_bias=((67, 30.0),))
    letters = [step.token_id for step in run(engine, Request(prompt, biased, max_tokens=30))[0]]
    assert letters[:5] == [67] * 5, "+30 is more than everything else"
    assert set(letters) != {67}, "each use in the answer costs 2"


def test_log_probabilities_are_the_models_own(engine: LlamaServerEngine, prompt: tuple[int, ...]) -> None:
    plain, _ = run(engine, Request(prompt, GREEDY, max_tokens=3, top_logprobs=2))
    for step in plain:
        assert step.top[0].token_id == step.token_id
        assert step.logprob == step.top[0].logprob <= 0
        assert step.top[1].logprob < step.top[0].logprob
        assert step.top[0].piece == step.piece
    only_chosen, _ = run(engine, Request(prompt, GREEDY, max_tokens=3, top_logprobs=0))
    assert [(s.logprob, s.top) for s in only_chosen] == [(pytest.approx(s.logprob, abs=1e-3), ()) for s in plain]
    ((step,), _) = run(engine, Request(prompt, Sampling(0.0, logit_bias=((67, 100.0),)), max_tokens=1, top_logprobs=1))
    assert step.token_id == 67
    assert step.logprob is not None
    assert step.logprob < -5, "before the bias"
    assert step.top[0].token_id == plain[0].token_id


# reasoning and grammars ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [0, 1, 5])
def test_the_budget_closes_the_reasoning(
    engine: LlamaServerEngine, prompt: tuple[int, ...], end: int, budget: int
) -> None:
    closing = (*engine.tokenize_piece("Enough.\n"), end)
    steps, finished = run(engine, Request(prompt, GREEDY, reasoning=Reasoning(frozenset([end]), closing, budget)))
    assert [step.forced for step in steps[:budget]] == [False] * budget
    assert tuple(step.token_id for step in steps if step.forced) == closing
    assert tuple(step.token_id for step in steps[budget:][: len(closing)]) == closing
    assert finished.timings.budget_reached
    assert finished.reason == "stop"
    assert len(steps) > budget + len(closing)


def test_a_ban_holds_from_the_forced_close_on_and_not_before(
    engine: LlamaServerEngine, prompt: tuple[int, ...]
) -> None:
    wanted, end, other = (engine.tokenize_piece(letter)[0] for letter in "abc")
    sampling, banned = Sampling(0.0, logit_bias=((wanted, 100.0),)), frozenset([wanted])
    steps, _ = run(engine, Request(prompt, sampling, max_tokens=8, banned=banned))
    assert wanted not in {step.token_id for step in steps}
    reasoning = Reasoning(frozenset([end]), (other, wanted, end), budget=4, break_loops=False)
    steps, _ = run(engine, Request(prompt, sampling, max_tokens=16, reasoning=reasoning, banned=banned))
    assert [step.token_id for step in steps[:7]] == [wanted] * 4 + [other, wanted, end]
    assert wanted not in {step.token_id for step in steps[7:]}


def test_a_token_that_never_comes(engine: LlamaServerEngine, prompt: tuple[int, ...]) -> None:
    steps, _ = run(engine, Request(prompt, Sampling(0.0), max_tokens=8))
    usual = steps[0].token_id
    steps, _ = run(engine, Request(prompt, Sampling(0.0, logit_bias=((usual, -math.inf),)), max_tokens=8))
    assert usual not in {step.token_id for step in steps}


def test_a_budget_may_end_inside_a_character(engine: LlamaServerEngine, prompt: tuple[int, ...], end: int) -> None:
    reasoning = Reasoning(frozenset([end]), (end,), budget=1)
    grammar = Grammar('root ::= "\U0001f600" [a-z]')
    steps, finished = run(engine, Request(prompt, GREEDY, max_tokens=20, grammar=grammar, reasoning=reasoning))
    assert text(steps).startswith(b"\xf0</think>"), "the first of its four bytes, though llama-server shows none alone"
    assert finished.timings.budget_reached
    assert finished.reason == "stop"


def test_forced_tokens_count_and_come_after_the_prefill(
    engine: LlamaServerEngine, prompt: tuple[int, ...], end: int
) -> None:
    reasoning = Reasoning(frozenset([end]), (end,) * 3, 0)
    kinds = [type(event) for event in list(Stream(engine, Request(prompt, GREEDY, reasoning=reasoning)))]
    assert kinds == sorted(kinds, key=[Prefill, Tokens, Finished].index)
    steps, finished = run(engine, Request(prompt, GREEDY, max_tokens=2, reasoning=reasoning))
    assert [step.forced for step in steps] == [True, True]
    assert finished.reason == "length"


def test_reasoning_that_ends_by_itself_is_left_alone(
    engine: LlamaServerEngine, prompt: tuple[int, ...], end: int
) -> None:
    plain, _ = run(engine, Request(prompt, GREEDY))
    n_reasoning = [step.token_id for step in plain].index(end)
    for budget in (n_reasoning + 1, 1000):  # the first ends a leg in the answer's first token
        steps, finished = run(engine, Request(prompt, GREEDY, reasoning=Reasoning(frozenset([end]), (end,), budget)))
        assert [step.token_id for step in steps] == [step.token_id for step in plain]
        assert not finished.timings.budget_reached


@pytest.mark.slow
def test_a_loop_is_broken(engine: LlamaServerEngine, prompt: tuple[int, ...], end: int) -> None:
    stuck = Sampling(0.0, logit_bias=((67, 100.0),))
    steps, finished = run(engine, Request(prompt, stuck, max_tokens=400, reasoning=Reasoning(frozenset([end]), (end,))))
    assert finished.timings.loop_broken
    assert [step.token_id for step in steps if step.forced] == [end]


@pytest.mark.slow
def test_end_reasoning_closes_it_live(engine: LlamaServerEngine, prompt: tuple[int, ...], end: int) -> None:
    stuck = Sampling(0.0, logit_bias=((67, 100.0),))
    reasoning = Reasoning(frozenset([end]), (end,), break_loops=False)
    stream = Stream(engine, Request(prompt, stuck, max_tokens=1500, reasoning=reasoning))
    steps: list[Step] = []
    for event in stream:
        if isinstance(event, Tokens):
            steps += event.steps
            if len(steps) >= 5:  # of several that come at a time it may be the fifth and the sixth
                stream.end_reasoning()  # once; after that it does nothing
    assert [step.token_id for step in steps if step.forced] == [end]
    assert 5 <= [step.forced for step in steps].index(True) < 1000
    assert not steps[-1].forced, "the answer went on"


@pytest.mark.parametrize("budget", [None, 3])
def test_a_grammar_starts_after_its_token(
    engine: LlamaServerEngine, prompt: tuple[int, ...], end: int, budget: int | None
) -> None:
    grammar = Grammar('answer ::= "\\nRoot: " root\nroot ::= [0-9] "!"', ((end, "answer"),))
    reasoning = Reasoning(frozenset([end]), (end,), budget)
    steps, finished = run(engine, Request(prompt, GREEDY, grammar=grammar, reasoning=reasoning))
    reasoning_text, answer = text(steps).split(b"</think>")
    assert reasoning_text.startswith(b"Looking for r")
    assert answer.startswith(b"\nRoot: ")
    assert answer[-2:-1].isdigit()
    assert answer.endswith(b"!")
    assert finished.reason == "stop"


def test_another_root_takes_the_rules_place_and_nothing_else() -> None:
    gbnf = 'root ::= "root" [root\\]] my-root # root\nmy-root ::= root | "\\"root"'
    assert with_start_rule(gbnf, "root") == gbnf
    assert with_start_rule(gbnf, "my-root") == (
        'root ::= my-root\nformer-root ::= "root" [root\\]] my-root # root\nmy-root ::= former-root | "\\"root"'
    )


def test_a_bad_grammar_is_refused(engine: LlamaServerEngine, prompt: tuple[int, ...]) -> None:
    with pytest.raises(BadGrammar, match="no rule 'answer'"):
        engine.submit(Request(prompt, grammar=Grammar('root ::= "a"', ((5, "answer"),))), lambda event: None)
    _, finished = run(engine, Request(prompt, grammar=Grammar("root ::= nothing")))
    assert finished.reason == "error"
    assert isinstance(finished.error, BadGrammar)
    assert text(run(engine, Request(prompt, GREEDY))[0]).endswith(ANSWER), "the others go on"


# MTP ----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_mtp_drafts_and_changes_nothing(
    spawn: Callable[..., LlamaServerEngine], engine: LlamaServerEngine, prompt: tuple[int, ...], end: int
) -> None:
    fast = spawn(mtp=True, n_parallel=1)
    plain, _ = run(engine, Request(prompt, GREEDY))
    steps, finished = run(fast, Request(prompt, GREEDY))
    assert steps == plain
    timings = finished.timings
    assert timings.drafted[0] >= timings.accepted[0] > 10
    assert timings.n_steps < len(steps) / 2
    assert fast.stats().accepted == timings.accepted
    steps, _ = run(fast, Request(prompt, GREEDY, top_logprobs=1, max_tokens=6))
    assert [step.token_id for step in steps] == [step.token_id for step in plain[:6]]
    assert all(step.logprob is not None for step in steps), "also of tokens that could have been drafted"


@pytest.mark.slow
def test_heads_in_a_file_of_their_own_draft_as_well(
    spawn: Callable[..., LlamaServerEngine], engine: LlamaServerEngine, prompt: tuple[int, ...], separate_gguf: Path
) -> None:
    fast = spawn(separate_gguf, mtp=True, mtp_file=separate_gguf.with_name("mtp-demo.gguf"), n_parallel=1)
    steps, finished = run(fast, Request(prompt, GREEDY))
    assert steps == run(engine, Request(prompt, GREEDY))[0]
    assert finished.timings.accepted[0] > 10


# several requests ---------------------------------------------------------------------------------------------------


def test_two_run_a_third_waits_a_fourth_is_refused(engine: LlamaServerEngine, prompt: tuple[int, ...]) -> None:
    streams = [Stream(engine, long(prompt)) for _ in range(3)]
    with pytest.raises(EngineBusy) as caught:
        engine.submit(Request(prompt), lambda event: None)
    assert 1 <= caught.value.retry_after <= 60
    stats = engine.stats()
    assert (stats.n_running, stats.n_queued) == (2, 1)
    waited = iter(streams[2])
    assert next(waited) == Queued(0)
    streams[0].close()
    assert isinstance(next(waited), Prefill), "its turn has come"
    for stream in streams[1:]:
        assert stream.close().reason == "cancelled"
    assert engine.stats().n_running == 0


@pytest.mark.slow
def test_two_that_fill_their_contexts_do_not_end_each_other(
    spawn: Callable[..., LlamaServerEngine], prompt: tuple[int, ...]
) -> None:
    engine = spawn(n_ctx=256)
    for stream in [Stream(engine, long(prompt)) for _ in range(2)]:
        *_, last = stream
        assert isinstance(last, Finished)
        assert last.reason == "length"
        assert 256 - 2 <= len(prompt) + last.timings.n_generated <= 256


def test_cancel_frees_the_slot(engine: LlamaServerEngine, prompt: tuple[int, ...]) -> None:
    before = engine.stats().n_generated_tokens
    for _ in range(4):  # more than there are slots
        stream = Stream(engine, long(prompt))
        assert any(isinstance(event, Tokens) for event in stream)
        assert stream.close().reason == "cancelled"
    assert 4 <= engine.stats().n_generated_tokens - before < 4 * 1500
    assert text(run(engine, Request(prompt, GREEDY))[0]).endswith(ANSWER)


@pytest.mark.slow
def test_a_queued_request_can_be_cancelled(engine: LlamaServerEngine, prompt: tuple[int, ...]) -> None:
    running = [Stream(engine, long(prompt)) for _ in range(2)]
    queued = Stream(engine, long(prompt))
    finished = queued.close()
    assert (finished.reason, finished.timings.n_generated) == ("cancelled", 0)
    for stream in running:
        stream.close()


# life and death -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_server_is_reported_and_started_again(
    spawn: Callable[..., LlamaServerEngine], prompt: tuple[int, ...], binary: str
) -> None:
    engine = spawn()
    stream = Stream(engine, long(prompt))
    for event in stream:
        if isinstance(event, Tokens):
            os.kill(last_started(binary), signal.SIGKILL)
            break
    finished = next(event for event in stream if isinstance(event, Finished))
    assert finished.reason == "error"
    assert isinstance(finished.error, EngineDied)
    assert finished.error.recovered
    assert "killed by SIGKILL" in finished.error.message
    assert "listening on http://127.0.0.1" in finished.error.message, "its last lines"
    assert text(run(engine, Request(prompt, GREEDY))[0]).endswith(ANSWER)
    assert engine.stats().n_recoveries == 1
    assert engine.stats().alive


@pytest.mark.slow
def test_a_server_that_dies_again_and_again_is_given_up(
    spawn: Callable[..., LlamaServerEngine], prompt: tuple[int, ...], binary: str
) -> None:
    engine = spawn()
    for n in range(RESTARTS + 1):
        assert eventually(lambda n=n: engine.stats().n_recoveries == n)
        assert engine.tokenize("x"), "it is there again"
        os.kill(last_started(binary), signal.SIGKILL)
    assert eventually(lambda: not engine.stats().alive)
    with pytest.raises(EngineDied, match="killed by SIGKILL") as caught:
        engine.tokenize("x")
    assert not caught.value.recovered
    with pytest.raises(EngineDied):
        engine.submit(Request(prompt), lambda event: None)


def test_what_cannot_be_loaded_is_said_with_its_last_lines(
    spawn: Callable[..., LlamaServerEngine], tmp_path: Path, demo_gguf: Path
) -> None:
    (tmp_path / "cut.gguf").write_bytes(demo_gguf.read_bytes()[:-100000])
    with pytest.raises(ModelLoadFailed, match=r"cut\.gguf could not be loaded: .*exited with code 1.*\n.*\n"):
        spawn(tmp_path / "cut.gguf")
    with pytest.raises(ModelLoadFailed, match="there is no such program"):
        spawn(binary=str(tmp_path / "absent"))
    with pytest.raises(ModelLoadFailed, match="RPC not supported in this build"):
        spawn(rpc=["127.0.0.1:1", "127.0.0.1:2"])


def test_nothing_is_left_after_close(spawn: Callable[..., LlamaServerEngine], prompt: tuple[int, ...]) -> None:
    before = children()
    engine = spawn()
    pids = children() - before
    assert len(pids) == 2, "the server and its guard"
    running = Stream(engine, long(prompt))
    next(iter(running))
    engine.close()
    assert eventually(lambda: all(map(is_gone, pids)))
    finished = running.close()
    assert finished.reason == "error"
    assert isinstance(finished.error, EngineDied)
    with pytest.raises(EngineDied):
        engine.submit(Request(prompt), lambda event: None)
    engine.close()


@pytest.mark.slow
def test_cache_types_and_batches_are_the_servers_too(
    spawn: Callable[..., LlamaServerEngine], prompt: tuple[int, ...]
) -> None:
    engine = spawn(attention=Attention("q8_0", "q8_0", "on"), batch=256, ubatch=64)
    assert text(run(engine, Request(prompt, GREEDY))[0]).endswith(ANSWER)
    with pytest.raises(ModelLoadFailed, match="exited with code"):
        spawn(attention=Attention("f16", "q8_0", "off"))


@pytest.mark.slow
def test_the_server_does_not_outlive_us_even_if_we_are_killed(demo_gguf: Path, binary: str) -> None:
    code = f"""
import os, signal
from pathlib import Path
from stepgguf.runtime.llamaserver import LlamaServerEngine, ServerOptions
from stepgguf.runtime.placement import Placement
options = ServerOptions(binary={binary!r}, n_ctx=256, placement=Placement(gpu_layers=0), threads=1)
engine = LlamaServerEngine.spawn(Path({str(demo_gguf)!r}), options, queue_limit=1)
os.kill(os.getpid(), signal.SIGKILL)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert eventually(lambda: is_gone(last_started(binary)))


@pytest.fixture
def foreign(binary: str, demo_gguf: Path) -> Iterator[str]:
    """The address of a llama-server that is not ours. Its key is `secret`."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [binary, "--model", str(demo_gguf), "--host", "127.0.0.1", "--port", str(port), "--threads", "1"]
    with subprocess.Popen(command, env={**os.environ, "LLAMA_API_KEY": "secret"}, stderr=subprocess.DEVNULL) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            while not LlamaServerClient(url, None).is_healthy():
                assert process.poll() is None
                time.sleep(0.05)
            yield url
        finally:
            process.kill()


def test_a_running_server_can_be_used(foreign: str, prompt: tuple[int, ...]) -> None:
    guest = LlamaServerEngine.attach(foreign, api_key="secret", model=None, queue_limit=1)
    assert guest.info.name == "demo"
    assert text(run(guest, Request(prompt, GREEDY))[0]).endswith(ANSWER)
    stream = Stream(guest, long(prompt))
    next(iter(stream))
    guest.close()
    assert isinstance(stream.close().error, EngineDied)
    again = LlamaServerEngine.attach(foreign, api_key="secret", model=None, queue_limit=1)
    assert again.tokenize("x"), "closing the guest leaves the server alone"
    with pytest.raises(EngineError, match="Invalid API Key"):
        LlamaServerEngine.attach(foreign, api_key="wrong", model=None, queue_limit=1)
    with pytest.raises(EngineError, match="no llama-server answers"):
        LlamaServerEngine.attach("http://127.0.0.1:1", api_key=None, model=None, queue_limit=1)
    with pytest.raises(EngineError, match="is not the address of a server"):
        LlamaServerEngine.attach("localhost:8080", api_key=None, model=None, queue_limit=1)
