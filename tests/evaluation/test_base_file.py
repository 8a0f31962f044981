"""llama-perplexity's base file against what llama-perplexity itself wrote and printed."""

from __future__ import annotations

import hashlib
import io
import struct
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from stepgguf.errors import EvaluationError
from stepgguf.evaluation import reference_file
from stepgguf.evaluation.coded_rows import CodedRows
from stepgguf.evaluation.columns import random_column
from stepgguf.evaluation.divergence import divergence
from stepgguf.evaluation.reference_file import ReferenceFile, row_form, write_reference
from stepgguf.evaluation.softmax import Floats
from tests.evaluation import recorded


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return recorded.write_base(tmp_path / "q4.base")


def test_a_file_of_recorded_logits_is_llama_perplexity_s_to_the_byte(base: Path) -> None:
    with ReferenceFile(base) as reference:
        column = reference.columns[0].column
    file = io.BytesIO()
    form = row_form(recorded.N_VOCAB, 0)
    assert sum(write_reference(file, [column], form, iter([recorded.logits()]))) == recorded.N_SCORED
    assert hashlib.sha256(file.getvalue()).hexdigest() == recorded.F32_BASE_SHA256


def test_statistics_against_a_file_of_llama_perplexity_are_those_it_prints(base: Path) -> None:
    with ReferenceFile(base) as reference:
        [kept] = reference.columns
        scores = kept.form.compare(kept.read(0, recorded.N_SCORED), recorded.logits(), kept.column.targets)
    d, printed = divergence(scores), recorded.statistics()
    assert d.correlation is not None
    found = {
        "Mean PPL(Q)": [f"{d.ppl.value:.6f}", f"{d.ppl.error:.6f}"],
        "Mean PPL(base)": [f"{d.ppl_base.value:.6f}", f"{d.ppl_base.error:.6f}"],
        "Cor(ln(PPL(Q)), ln(PPL(base)))": [f"{100 * d.correlation:.2f}"],
        "Mean ln(PPL(Q)/PPL(base))": [f"{d.ln_ratio.value:.6f}", f"{d.ln_ratio.error:.6f}"],
        "Mean KLD": [f"{d.kld.value:.6f}", f"{d.kld.error:.6f}"],
        "Maximum KLD": [f"{d.kld_max:.6f}"],
        "99.9% KLD": [f"{d.kld_quantiles[0.999]:.6f}"],
        "99.0% KLD": [f"{d.kld_quantiles[0.99]:.6f}"],
        "95.0% KLD": [f"{d.kld_quantiles[0.95]:.6f}"],
        "90.0% KLD": [f"{d.kld_quantiles[0.9]:.6f}"],
        "Median KLD": [f"{d.kld_median:.6f}"],
        "10.0% KLD": [f"{d.kld_quantiles[0.1]:.6f}"],
        "5.0% KLD": [f"{d.kld_quantiles[0.05]:.6f}"],
        "1.0% KLD": [f"{d.kld_quantiles[0.01]:.6f}"],
        "0.1% KLD": [f"{d.kld_quantiles[0.001]:.6f}"],
        "Minimum KLD": [f"{d.kld_min:.6f}"],
        "RMS Δp": [f"{100 * d.delta_p_rms.value:.3f}", f"{100 * d.delta_p_rms.error:.3f}"],
        "Same top p": [f"{100 * d.same_top.value:.3f}", f"{100 * d.same_top.error:.3f}"],
    }
    assert found == {name: printed[name] for name in found}


def test_the_head_of_a_file_is_read(base: Path) -> None:
    n_ctx, n_vocab, n_chunk = struct.unpack("<3i", recorded.base_bytes()[8:20])
    with ReferenceFile(base) as reference:
        [kept] = reference.columns
    assert (reference.n_vocab, kept.form.top_k) == (n_vocab, 0)
    assert (kept.column.name, kept.column.n_scored) == (f"text, context {n_ctx}", recorded.N_SCORED)
    tokens = np.frombuffer(recorded.base_bytes(), "<i4", n_ctx * n_chunk, 20)
    assert np.array_equal(np.concatenate(kept.column.rows), tokens)
    assert kept.offset == 20 + tokens.nbytes


@pytest.mark.parametrize("n_vocab", [768, 4095])
def test_a_row_has_an_even_number_of_codes(n_vocab: int) -> None:
    assert CodedRows(n_vocab).dtype.itemsize == 2 * (2 * ((n_vocab + 1) // 2) + 4)


def test_codes_are_off_by_half_a_step_and_never_below_the_floor() -> None:
    logits = np.random.default_rng(0).normal(0, 6, (50, 999)).astype(np.float32)
    rows = CodedRows(999).encode(logits, np.zeros(50, np.int32))
    log_p = rows["scale"][:, None].astype(float) * rows["codes"][:, :999] + rows["min_log_prob"][:, None]
    exact = logits.astype(float) - np.log(np.exp(logits.astype(float)).sum(axis=-1, keepdims=True))
    floor = np.maximum(exact, exact.max(axis=-1, keepdims=True) - 16)
    # Half a step of at most 16 / 65535, and float32's rounding of sums around 30: two units of 2 ** -19 each.
    assert np.abs(log_p - floor).max() <= 8 / 65535 + 2 * 2**-19


def test_equal_logits_have_no_scale() -> None:
    [row] = CodedRows(4).encode(np.full((1, 4), 3.0, np.float32), np.zeros(1, np.int32))
    assert (row["scale"], row["codes"].tolist()) == (0, [0, 0, 0, 0])
    assert row["min_log_prob"] == pytest.approx(-np.log(4))


@pytest.mark.parametrize("size", [0, 7, 8, 19, 20, 900, 163_035])
def test_a_file_that_was_cut_off_is_refused_before_anything_runs(base: Path, size: int) -> None:
    base.write_bytes(recorded.base_bytes()[:size])
    with pytest.raises(EvaluationError, match=r"truncated|no reference") as error:
        ReferenceFile(base)
    assert str(base) in error.value.message


@pytest.mark.parametrize(
    ("offset", "value", "words"),
    [
        (0, b"GGUF", "a column begins with b'GGUFits_'"),
        (8, struct.pack("<i", 1), "a context of 1"),
        (12, struct.pack("<i", 300), "token"),
        (12, struct.pack("<i", -1), "-1 tokens in the vocabulary"),
        (16, struct.pack("<i", 2**30), "truncated"),
        (20, struct.pack("<i", 768), "token 768 in a vocabulary of 768"),
    ],
)
def test_a_head_that_cannot_be_is_refused(base: Path, offset: int, value: bytes, words: str) -> None:
    data = bytearray(recorded.base_bytes())
    data[offset : offset + len(value)] = value
    base.write_bytes(data)
    with pytest.raises(EvaluationError) as error:
        ReferenceFile(base)
    assert words in error.value.message
    assert error.value.hint


def test_memory_does_not_grow_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_file, "SLAB_VALUES", 2**14)
    few, many = (_peak_of_pass(tmp_path / "x.base", n_rows) for n_rows in (4, 64))
    assert (tmp_path / "x.base").stat().st_size > 4_000_000
    assert many < few + 200_000  # tokens, and five numbers a prediction; all rows have 4 MB


def _peak_of_pass(path: Path, n_rows: int) -> int:
    """The most bytes that writing and reading a reference of so many rows of 64 tokens took."""
    column, form = random_column(1024, 64, n_rows), row_form(1024, 0)

    def blocks() -> Iterator[Floats]:
        rng = np.random.default_rng(0)
        return (rng.normal(size=(31, 1024)).astype(np.float32) for _ in range(n_rows))

    tracemalloc.start()
    try:
        with path.open("wb") as file:
            assert sum(write_reference(file, [column], form, blocks())) == column.n_scored
        with ReferenceFile(path) as reference:
            [kept] = reference.columns
            for i, block in enumerate(blocks()):
                kept.form.compare(kept.read(31 * i, 31), block, column.targets[31 * i : 31 * i + 31])
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
