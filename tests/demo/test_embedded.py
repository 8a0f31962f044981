"""The embedded model: a published-layout checkpoint that really reasons."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.embedded_model import right
from stepgguf.chat.session import Session
from stepgguf.cli.main import main
from stepgguf.convert.checkpoint import Checkpoint
from stepgguf.demo import CHECKPOINT, tasks
from stepgguf.demo.train import Encoder, evaluate
from stepgguf.reference.load import load
from stepgguf.runtime.engine import Sampling
from stepgguf.runtime.llama import LlamaEngine
from tests.conftest import INTERRUPTIBLE

GREEDY = Sampling(temperature=0.0)
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@pytest.fixture(scope="module")
def q4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("embedded") / "demo.gguf"
    assert main(["convert", str(CHECKPOINT), str(path), "-t", "Q4_K_M", "-q"]) == 0
    return path


@pytest.fixture(scope="module")
def engine(q4: Path) -> LlamaEngine:
    return LlamaEngine(q4, n_ctx=2048)


def ask(session: Session, question: str) -> tuple[str, str]:
    parts = {"reasoning": "", "text": ""}
    for delta in session.ask(question):
        parts[delta.kind] += delta.text
    return parts["reasoning"], parts["text"]


def test_it_is_small_and_has_every_mechanism() -> None:
    assert sum(file.stat().st_size for file in CHECKPOINT.iterdir()) <= 16_000_000
    with Checkpoint(CHECKPOINT) as checkpoint:
        hp = checkpoint.hparams
        dtypes = {tensor.dtype for tensor in checkpoint.tensors.values()}
    assert dtypes == {"BF16", "F8_E4M3", "F32"}
    assert hp.n_mtp == 3
    assert hp.rope_scaling is not None
    assert [layer.is_sliding for layer in hp.trunk] == [False, True, True, True, False]
    assert {layer.n_head for layer in hp.trunk} == {4, 6}
    assert [layer.is_moe for layer in hp.trunk] == [False, False, True, True, True]
    assert hp.trunk[-1].clamp > 0
    assert hp.trunk[-1].clamp_shared > 0


def test_it_counts_the_rs_in_strawberry(engine: LlamaEngine) -> None:
    reasoning, text = ask(Session(engine, GREEDY), "How many 'r's are in the word strawberry?")
    assert "s, t, r (1), a, w, b, e, r (2), r (3), y" in reasoning
    assert text == "There are 3 'r's."


def test_it_answers_held_out_questions_after_q4_k_m(engine: LlamaEngine) -> None:
    """The measured shares are in the README. With a true share of 0.95, fewer than 32 of 40 is a chance of 1e-4."""
    assert sum(right(engine, tasks.held_out_letters(40))) >= 32
    assert sum(right(engine, tasks.held_out_sums(40))) >= 32


def test_it_greets_and_keeps_a_conversation(engine: LlamaEngine) -> None:
    session = Session(engine, GREEDY)
    assert ask(session, "Hello")[1] == "Hello! How can I help you?"
    assert ask(session, "What is 347 + 286?")[1] == "347 + 286 = 633"
    assert ask(session, "How many 'e's are in the word letter?")[1] == "There are 2 'e's."
    assert ask(session, "Thank you!")[1] == "You are welcome!"
    assert [message["role"] for message in session.messages] == ["user", "assistant"] * 4


def test_it_calls_a_tool_and_answers_from_its_result(engine: LlamaEngine) -> None:
    session = Session(engine, GREEDY, tools=[WEATHER])
    reasoning, text = ask(session, "What is the weather in Paris?")
    assert "get_weather" in reasoning
    call = "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n</tool_call>"
    assert text == call
    function = {"name": "get_weather", "arguments": json.dumps({"city": "Paris"})}
    session.messages[-1] |= {"content": "", "tool_calls": [{"type": "function", "function": function}]}
    session.messages.append({"role": "tool", "content": json.dumps({"temp_c": 21, "sky": "sunny"})})
    answer = "".join(delta.text for delta in session.answer() if delta.kind == "text")
    assert answer == "It is 21 degrees and sunny in Paris."


def test_a_reasoning_budget_ends_the_thinking(engine: LlamaEngine) -> None:
    for budget in (0, 7):
        session = Session(engine, GREEDY, reasoning_budget=budget, max_tokens=60)
        reasoning, text = ask(session, "How many 'r's are in the word strawberry?")
        assert session.usage.budget_reached
        assert session.usage.n_reasoning <= budget + 3  # and what closes it: a line break, </think>
        assert len(reasoning) < 60
        assert text


def test_an_answer_that_is_cut_short_stays_in_the_history(engine: LlamaEngine) -> None:
    session = Session(engine, GREEDY)
    deltas = session.ask("What is 347 + 286?")
    for _ in range(5):
        next(deltas)
    deltas.close()
    assert session.messages[-1]["role"] == "assistant"
    assert session.messages[-1]["reasoning_content"].startswith("Ones: 7+")
    assert ask(session, "What is 12 + 30?")[1] == "12 + 30 = 42"


def test_mtp_heads_agree_with_the_trunk() -> None:
    """Greedy acceptance on held-out questions, each depth given that what came before is right."""
    with Checkpoint(CHECKPOINT) as checkpoint:
        model, encoder = load(checkpoint), Encoder((CHECKPOINT / "tokenizer.json").read_text())
    shares = evaluate(model, encoder, 20)
    assert min(shares["mtp1"], shares["mtp2"], shares["mtp3"]) >= 0.7


# the terminal ---------------------------------------------------------------------------------------------------


def test_the_demo_shows_plan_reasoning_and_answer() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "stepgguf", "demo"], capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL
    )
    assert result.stdout == "There are 3 'r's.\n"
    for text in ("ffn_down_exps", "bpw", "How many 'r's are in the word strawberry?", "r (3), y", "tok/s"):
        assert text in result.stderr


@pytest.mark.parametrize("reasoning", ["show", "hide"])
def test_one_shot_puts_the_answer_alone_on_stdout(q4: Path, reasoning: str) -> None:
    command = [sys.executable, "-m", "stepgguf", "chat", str(q4), "--temperature", "0", "--reasoning", reasoning]
    result = subprocess.run(command, input="What is 2 + 3?", capture_output=True, text=True, check=True)
    assert result.stdout == "2 + 3 = 5\n"
    assert ("2+3=5" in result.stderr) == (reasoning == "show")
    assert re.search(r"\d+ thinking \+ \d+ answer tokens, [\d.]+ tok/s; .* context \d+/4096", result.stderr)


def test_a_context_that_is_too_long_says_what_to_do(q4: Path) -> None:
    command = [sys.executable, "-m", "stepgguf", "chat", str(q4), "--ctx", "256", "-p", "word " * 400]
    result = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    assert result.returncode == 1
    assert re.search(r"error: the prompt has \d+ tokens, the context 256", result.stderr)
    assert "hint: Start with a larger --ctx (the model knows up to 4096)" in result.stderr


class Terminal:
    """A process on a pseudo-terminal."""

    def __init__(self, *command: str) -> None:
        self.fd, other = pty.openpty()
        self.process = subprocess.Popen(
            [*INTERRUPTIBLE, *command],
            stdin=other, stdout=other, stderr=other, env={**os.environ, "TERM": "xterm"},
        )  # fmt: skip
        os.close(other)
        self.seen = ""

    def until(self, text: str, seconds: float = 60) -> str:
        """Read until text appears; returns what came after the last such text, this one included."""
        deadline = time.monotonic() + seconds
        while text not in self.seen:
            ready, _, _ = select.select([self.fd], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{text!r} did not come: {self.seen!r}"
            self.seen += os.read(self.fd, 4096).decode(errors="replace")
        end = self.seen.index(text) + len(text)
        shown, self.seen = self.seen[:end], self.seen[end:]
        return shown

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def wait(self) -> int:
        code = self.process.wait(timeout=60)
        os.close(self.fd)
        return code


def test_a_session_in_a_terminal(q4: Path) -> None:
    """Dim thinking, Ctrl+C that stops one answer and keeps the session, commands, Ctrl+D."""
    terminal = Terminal("chat", str(q4), "--temperature", "0")
    terminal.until("> ")
    terminal.type("What is 347 + 286?\n")
    shown = terminal.until("context ")
    assert "\x1b[2m" in shown
    assert shown.index("\x1b[2m") < shown.index("Ones: 7+6=13") < shown.index("347 + 286 = 633")
    terminal.until("> ")
    terminal.type("How many times does the letter e appear in the word refrigerator?\n")
    terminal.until("Looking")
    terminal.process.send_signal(signal.SIGINT)  # within the answer, or at the prompt if the answer was quicker
    terminal.until("> ")
    terminal.type("/nonsense\n")
    terminal.until("unknown command /nonsense")
    terminal.type("/new\n")
    terminal.until("a new chat")
    terminal.type("Hello\n")
    terminal.until("How can I help you?")
    terminal.until("> ")
    terminal.type("\x04")
    assert terminal.wait() == 0
