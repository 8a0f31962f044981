"""Logits of the engine and of the torch reference, which know nothing of each other, on the same rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from stepgguf.cli.main import main
from stepgguf.convert.sources.opening import open_source
from stepgguf.demo import CHECKPOINT
from stepgguf.errors import EvaluationError
from stepgguf.evaluation import engine_logits
from stepgguf.evaluation.columns import Column, ScoredRow, dialogue_column
from stepgguf.evaluation.engine_logits import EngineLogits
from stepgguf.evaluation.evaluate import keep_reference
from stepgguf.evaluation.matching import require_vocabulary
from stepgguf.evaluation.reference_file import ReferenceFile, row_form
from stepgguf.evaluation.softmax import Floats
from stepgguf.evaluation.sources import LogitSource
from stepgguf.evaluation.stream_logits import StreamLogits, group_rows, token_rows
from stepgguf.reference import stream
from stepgguf.runtime.llama.model import LlamaModel
from stepgguf.runtime.placement import Placement

SENTENCE = "<|im_start|>user\nHow many 'r's are in strawberry?<|im_end|>\n<|im_start|>assistant\n<think>\n"


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaModel]:
    path = tmp_path_factory.mktemp("f32") / "f32.gguf"
    assert main(["convert", str(CHECKPOINT), str(path), "-t", "F32", "--mtp", "drop", "-q"]) == 0
    model = LlamaModel(path, Placement(), mtp=False, mmap=True, progress=None)
    yield model
    model.close()


@pytest.fixture(scope="module")
def rows(model: LlamaModel) -> list[ScoredRow]:
    """A row of which the second half counts, one of which all does, both longer than the window of 64, and a short
    one."""
    tokens = np.array(model.tokenize(SENTENCE * 4, add_special=True), np.int32)
    assert len(tokens) > 140
    return [ScoredRow(tokens[:96], 48), ScoredRow(tokens[:20], 0), ScoredRow(tokens, 0)]


def joined(source: LogitSource, rows: Sequence[ScoredRow]) -> Floats:
    return np.concatenate([block.copy() for block in source.logits(rows)])


def streamed(path: Path, rows: Sequence[ScoredRow], folder: Path) -> Floats:
    with open_source(path) as source:
        return joined(StreamLogits(source, torch.device("cpu"), folder, lambda at: None), rows)


@pytest.fixture(scope="module")
def expected(rows: list[ScoredRow], tmp_path_factory: pytest.TempPathFactory) -> Floats:
    """The checkpoint's logits."""
    return streamed(CHECKPOINT, rows, tmp_path_factory.mktemp("checkpoint") / "states")


def test_the_engine_and_the_streamed_reference_agree(
    model: LlamaModel, rows: list[ScoredRow], expected: Floats
) -> None:
    found = joined(EngineLogits(model, 1), rows)
    assert found.shape == expected.shape == (sum(row.n_scored for row in rows), model.n_vocab)
    # Of logits up to 35: llama.cpp keeps keys and values as float16, whose step is 2 ** -11 of the value.
    assert np.abs(found - expected).max() < 35 * 2**-11


def test_a_gguf_streams_to_the_logits_of_its_checkpoint_a_few_tokens_at_a_time(
    model: LlamaModel, rows: list[ScoredRow], expected: Floats, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces of a row begin before, in and behind what counts of its documents."""
    monkeypatch.setattr(stream, "HEAD_TOKENS", 17)
    found = streamed(model.path, rows, tmp_path / "states")
    assert found == pytest.approx(expected, abs=35 * 2**-18)  # norms are 1 + w here and w there: 6 bits are spare


def test_rows_are_packed_in_their_order(rows: list[ScoredRow]) -> None:
    groups = group_rows(rows)
    assert [[len(row.tokens) for row in group] for group in groups] == [[96, 20], [len(rows[2].tokens)]]
    packed = token_rows(groups)
    assert packed.n_tokens == sum(len(row.tokens) for row in rows)
    assert packed.documents[0, [0, 95, 96, 115, 116]].tolist() == [0, 0, 1, 1, -1]
    assert np.array_equal(packed.tokens[0, 96:116], rows[1].tokens)


def test_a_row_longer_than_a_decode_is_read_in_parts(
    model: LlamaModel, rows: list[ScoredRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = joined(EngineLogits(model, 1), rows)
    monkeypatch.setattr(engine_logits, "BATCH", 32)
    blocks = [block.copy() for block in EngineLogits(model, 1).logits(rows)]
    assert [len(block) for block in blocks[:2]] == [16, 31]  # at 48 to 63, and 64 to 94
    assert np.concatenate(blocks) == pytest.approx(whole, abs=35 * 2**-11)


class Broken:
    """A model whose logits are no numbers."""

    name, n_vocab = "broken.gguf", 8

    def logits(self, rows: Sequence[ScoredRow]) -> Iterator[Floats]:
        return (np.full((row.n_scored, 8), np.nan, np.float32) for row in rows)


@pytest.fixture
def column() -> Column:
    return dialogue_column([[1, 2, 3, 4]])


def test_logits_that_are_no_numbers_are_refused(tmp_path: Path, column: Column) -> None:
    with (tmp_path / "x").open("wb") as file, pytest.raises(EvaluationError, match=r"broken.gguf: .* no numbers"):
        keep_reference(file, Broken(), [column], row_form(8, 2), None, lambda n: None)


def test_another_vocabulary_is_refused_on_both_sides(tmp_path: Path, column: Column, model: LlamaModel) -> None:
    with (tmp_path / "x").open("wb") as file, pytest.raises(EvaluationError, match=r"8 tokens, .* file has 9"):
        keep_reference(file, Broken(), [column], row_form(9, 2), None, lambda n: None)
    with (tmp_path / "x").open("wb") as file:
        keep_reference(file, EngineLogits(model, 1), [column], row_form(768, 2), None, lambda n: None)
    with ReferenceFile(tmp_path / "x") as kept, pytest.raises(EvaluationError, match=r"768 tokens, .* file has 8"):
        require_vocabulary(kept.columns, 8)
