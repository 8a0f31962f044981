"""Stock mixtures against llama-quantize itself, for the real 45-layer shapes and without a byte of weights.

llama-quantize's dry run only reads a GGUF's header, so a sparse file with the header of the real 394 GB model will do.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from stepgguf.convert.metadata import model_keys
from stepgguf.convert.plan import Constant, Options, PlannedFile, PlannedTensor
from stepgguf.convert.planner import choose_file_types
from stepgguf.errors import RecipeError
from stepgguf.files import gguf_header
from stepgguf.model.hparams import HParams
from stepgguf.model.rope import ROPE_FREQS, rope_freqs
from stepgguf.model.tensors import tensor_specs
from stepgguf.quants import mixtures
from stepgguf.quants.mixtures import BASE_TYPES, RuleFacts
from stepgguf.quants.recipe_files import load_recipe
from stepgguf.quants.type_names import check_type_name
from stepgguf.quants.types import F32, fitting_type, row_size
from tests.conftest import real_config
from tests.oracle import chosen_types, llama_quantize

HP = HParams.from_config(real_config())
NARROW = replace(HP, hidden_size=4064)
FACTS = RuleFacts(n_layer=45, n_expert=288, gqa=8)
TRUNK = [spec for spec in tensor_specs(HP) if not spec.is_mtp]
CANDIDATES = [s for s in TRUNK if s.is_quantizable]

# Tensor data of the real trunk in GB, without and with an importance matrix where that changes the mixture.
GIGABYTES = {
    "IQ1_S": 39.41, "IQ1_M": 43.90, "IQ2_XXS": 51.40, "IQ2_XS": 57.47, "IQ2_S": 57.98, "IQ2_M": 63.98, "Q2_K_S": 65.86,
    "Q2_K": 71.80, "IQ3_XXS": 79.16, "IQ3_XS": 80.10, "Q3_K_S": 85.01, "IQ3_S": 85.04, "IQ3_M": 85.73, "Q3_K_M": 93.80,
    "Q3_K_L": 102.04, "IQ4_XS": 105.48, "MXFP4_MOE": 108.34, "Q4_0": 111.10, "Q4_K_S": 111.49, "IQ4_NL": 111.52,
    "Q4_K_M": 118.58, "Q5_K_S": 135.64, "Q5_K_M": 139.50, "Q6_K": 161.72, "Q8_0": 209.41, "BF16": 394.01,
}  # fmt: skip
WITH_IMATRIX = {"IQ4_XS": 104.99, "IQ3_XXS": 75.75}


def gigabytes(name: str, *, has_imatrix: bool = False) -> float:
    choices = mixtures.choose_types(name, CANDIDATES, FACTS, has_imatrix=has_imatrix)
    n = sum(
        math.prod(c.shape[:-1]) * row_size(choice.ggml_type, c.shape[-1])
        for c, choice in zip(CANDIDATES, choices, strict=True)
    )
    return (n + sum(4 * math.prod(s.shape) for s in TRUNK if not s.is_quantizable) + 256) / 1e9


@pytest.mark.parametrize("name", GIGABYTES)
def test_sizes_of_the_real_trunk(name: str) -> None:
    assert round(gigabytes(name), 2) == GIGABYTES[name]


@pytest.mark.parametrize("name", WITH_IMATRIX)
def test_sizes_with_an_importance_matrix(name: str) -> None:
    assert round(gigabytes(name, has_imatrix=True), 2) == WITH_IMATRIX[name]


@pytest.fixture(scope="module")
def real_header(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real model's BF16 GGUF as a sparse file: its header, and nothing but holes after it."""
    return sparse(tmp_path_factory.mktemp("real") / "bf16.gguf", HP)


@pytest.fixture(scope="module")
def narrow_header(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with rows that blocks of 32 divide and blocks of 256 do not."""
    return sparse(tmp_path_factory.mktemp("narrow") / "bf16.gguf", NARROW)


def sparse(path: Path, hp: HParams) -> Path:
    chosen, _ = choose_file_types(tensor_specs(hp), None, FACTS, Options(load_recipe("BF16"), mtp="drop"))
    nothing, freqs = Constant(b""), rope_freqs(hp) or b""
    tensors = [PlannedTensor(s.name, s.shape, choice.ggml_type, choice.reason, nothing) for s, choice in chosen]
    tensors.insert(0, PlannedTensor(ROPE_FREQS, (len(freqs) // 4,), F32, "", nothing))
    file = PlannedFile(path, tuple(model_keys(hp, "real", "288x7.4B", with_mtp=False)), tuple(tensors))
    with path.open("wb") as out:
        out.write(file.header)
        out.truncate(file.size)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in BASE_TYPES if n != "F32"])
def test_every_type_of_the_real_model_is_llama_quantizes(name: str, real_header: Path, tmp_path: Path) -> None:
    log = llama_quantize(real_header, tmp_path / "unused.gguf", name, dry_run=True)
    theirs = chosen_types(log)
    choices = mixtures.choose_types(name, CANDIDATES, FACTS)
    ours = {c.name: choice.ggml_type.name for c, choice in zip(CANDIDATES, choices, strict=True)}
    assert len(theirs) == 754
    assert {name: theirs[name] for name in ours} == ours
    assert {theirs[spec.name] for spec in TRUNK if not spec.is_quantizable} == {"F32"}
    assert ("will require an imatrix" in log) == any(
        mixtures.requires_imatrix(name, c, choice.ggml_type) for c, choice in zip(CANDIDATES, choices, strict=True)
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in BASE_TYPES if n != "F32"])
def test_rows_that_blocks_do_not_divide_get_llama_quantizes_types(
    name: str, narrow_header: Path, tmp_path: Path
) -> None:
    theirs = chosen_types(llama_quantize(narrow_header, tmp_path / "unused.gguf", name, dry_run=True))
    specs = [spec for spec in tensor_specs(NARROW) if spec.is_quantizable and not spec.is_mtp]
    choices = mixtures.choose_types(name, specs, FACTS)
    ours = {spec.name: choice.ggml_type.name for spec, choice in zip(specs, choices, strict=True)}
    assert {name: theirs[name] for name in ours} == ours


def test_the_trunks_types_do_not_depend_on_mtp() -> None:
    specs = tensor_specs(HP)
    with_mtp, _ = choose_file_types(specs, None, FACTS, Options(load_recipe("Q4_K_M"), mtp="include"))
    without, _ = choose_file_types(specs, None, FACTS, Options(load_recipe("Q4_K_M"), mtp="drop"))
    types = {spec.name: choice.ggml_type for spec, choice in with_mtp}
    assert all(types[spec.name] == choice.ggml_type for spec, choice in without)
    mtp = {choice.ggml_type.name for spec, choice in with_mtp if (spec, choice) not in without}
    assert mtp == {"Q8_0", "F32"}


def test_an_unknown_type_is_refused_with_the_list() -> None:
    with pytest.raises(RecipeError, match="unknown type 'Q4_K_X'") as caught:
        check_type_name("Q4_K_X")
    assert "Q4_K_M" in (caught.value.hint or "")


def test_rows_that_blocks_do_not_divide_fall_back() -> None:
    assert fitting_type(BASE_TYPES["Q4_K_M"], 96).name == "Q5_0"
    assert fitting_type(BASE_TYPES["IQ4_XS"], 96).name == "IQ4_NL"
    assert fitting_type(BASE_TYPES["Q6_K"], 100).name == "F16"


def test_the_sparse_file_is_read_like_a_real_one(real_header: Path) -> None:
    assert len(gguf_header.read(real_header).tensors) == 754
