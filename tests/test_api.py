"""What programs import; the examples of docs/python.md are run by tests/docs."""

from __future__ import annotations

from pathlib import Path

import pytest

from stepgguf.api import convert, open_session
from stepgguf.chat.output import Delta
from stepgguf.cli.main import main
from stepgguf.conversation.records import ChatSettings
from stepgguf.demo import CHECKPOINT
from stepgguf.errors import DoesNotFit, OutputError
from stepgguf.runtime.llama import LlamaOptions

pytestmark = pytest.mark.slow


def test_convert_makes_what_the_command_makes(tmp_path: Path) -> None:
    shares: list[float] = []
    made = convert(CHECKPOINT, tmp_path / "x.gguf", progress=lambda done, total: shares.append(done / total))
    assert main(["convert", str(CHECKPOINT), str(tmp_path / "y.gguf"), "-t", "Q4_K_M", "-q"]) == 0
    assert [path.name for path in made] == ["x.gguf"]
    assert (tmp_path / "x.gguf").read_bytes() == (tmp_path / "y.gguf").read_bytes()
    assert shares == sorted(shares)
    assert shares[-1] == 1


def test_a_file_that_is_there_is_not_replaced_unless_that_is_meant(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"precious")
    with pytest.raises(OutputError):
        convert(CHECKPOINT, tmp_path / "x.gguf")
    assert (tmp_path / "x.gguf").read_bytes() == b"precious"
    convert(CHECKPOINT, tmp_path / "x.gguf", overwrite=True)


def test_a_session_answers_and_remembers(demo_gguf: Path) -> None:
    options = LlamaOptions(n_ctx=2048, threads=1)
    with open_session(demo_gguf, ChatSettings({"temperature": 0.0}), options) as session:
        text = "".join(u.text for u in session.ask("What is 347 + 286?") if isinstance(u, Delta) and u.kind == "text")
        assert text.strip() == "347 + 286 = 633"
        assert [message["role"] for message in session.messages] == ["user", "assistant"]


def test_what_does_not_fit_is_refused(demo_gguf: Path) -> None:
    with (
        pytest.raises(DoesNotFit, match="8,192 tokens is longer"),
        open_session(demo_gguf, options=LlamaOptions(n_ctx=8192)),
    ):
        pass
