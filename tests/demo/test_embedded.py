"""The embedded model: a published-layout checkpoint that really reasons."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.embedded_model import answers
from stepgguf.chat.exchange import ChatModel
from stepgguf.cli.main import main
from stepgguf.conversation.inprocess import InProcessBackend
from stepgguf.conversation.records import ChatSettings
from stepgguf.conversation.session import Session
from stepgguf.convert.sources.checkpoint import Checkpoint
from stepgguf.demo import CHECKPOINT, tasks
from stepgguf.demo.train import Encoder, evaluate
from stepgguf.reference.load import load_reference
from stepgguf.runtime.llama import LlamaEngine, LlamaOptions

pytestmark = pytest.mark.slow

GREEDY = ChatSettings({"temperature": 0.0})


@pytest.fixture(scope="module")
def q4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("embedded") / "demo.gguf"
    assert main(["convert", str(CHECKPOINT), str(path), "-t", "Q4_K_M", "-q"]) == 0
    return path


@pytest.fixture(scope="module")
def chat(q4: Path) -> Iterator[ChatModel]:
    with LlamaEngine(q4, LlamaOptions(n_ctx=2048)) as engine:
        yield ChatModel(engine)


@pytest.fixture(scope="module")
def backend(chat: ChatModel) -> InProcessBackend:
    return InProcessBackend(chat)


def ask(session: Session, question: str) -> tuple[str, str]:
    list(session.ask(question))
    return session.messages[-1]["reasoning_content"], session.messages[-1]["content"]


def test_it_is_small_and_has_every_mechanism() -> None:
    assert sum(file.stat().st_size for file in CHECKPOINT.iterdir()) <= 16_000_000
    with Checkpoint(CHECKPOINT) as checkpoint:
        hp = checkpoint.hparams
        dtypes = {tensor.dtype for tensor in checkpoint.tensors.values()}
    assert dtypes == {"BF16", "F8_E4M3", "F32"}
    assert hp.n_mtp == 3
    assert hp.rope_scaling is not None
    assert [layer.is_sliding for layer in hp.trunk_layers] == [False, True, True, True, False]
    assert {layer.n_head for layer in hp.trunk_layers} == {4, 6}
    assert [layer.is_moe for layer in hp.trunk_layers] == [False, False, True, True, True]
    assert hp.trunk_layers[-1].clamp > 0
    assert hp.trunk_layers[-1].clamp_shared > 0


def test_it_counts_the_rs_in_strawberry(backend: InProcessBackend) -> None:
    reasoning, text = ask(Session(backend, GREEDY), "How many 'r's are in the word strawberry?")
    assert "s, t, r (1), a, w, b, e, r (2), r (3), y" in reasoning
    assert text == "There are 3 'r's."


def test_it_answers_held_out_questions_after_q4_k_m(chat: ChatModel) -> None:
    """The measured shares are in the README. With a true share of 0.95, fewer than 32 of 40 is a chance of 1e-4."""
    assert sum(answers(chat, tasks.held_out_letters(40))[0]) >= 32
    assert sum(answers(chat, tasks.held_out_sums(40))[0]) >= 32


def test_it_greets_and_keeps_a_conversation(backend: InProcessBackend) -> None:
    session = Session(backend, GREEDY)
    assert ask(session, "Hello")[1] == "Hello! How can I help you?"
    assert ask(session, "What is 347 + 286?")[1] == "347 + 286 = 633"
    assert ask(session, "How many 'e's are in the word letter?")[1] == "There are 2 'e's."
    assert ask(session, "Thank you!")[1] == "You are welcome!"
    assert [message["role"] for message in session.messages] == ["user", "assistant"] * 4


def test_mtp_heads_agree_with_the_trunk() -> None:
    """Greedy acceptance on held-out questions, each depth given that what came before is right."""
    with Checkpoint(CHECKPOINT) as checkpoint:
        model, encoder = load_reference(checkpoint), Encoder((CHECKPOINT / "tokenizer.json").read_text())
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
