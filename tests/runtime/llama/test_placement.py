"""Placement, cache types and batches: what llama.cpp is told, what it says it did, and that the text stays the same.

There is no GPU here: what is for cards is read back from the struct that llama.cpp gets, and tensors are put into the
CPU's buffer type for real.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path

import llama_cpp
import pytest

from stepgguf.convert.sources.gguf_file import GGUFSource
from stepgguf.errors import ModelLoadFailed
from stepgguf.runtime.llama import LlamaEngine
from stepgguf.runtime.llama.context import DecodeRows
from stepgguf.runtime.llama.model_params import ModelParams
from stepgguf.runtime.llama_build import buffer_types
from stepgguf.runtime.placement import ALL_LAYERS, Attention, Placement
from tests.oracle import silence
from tests.runtime.llama.conftest import FreshContext, question, run
from tests.runtime.llama.test_prefix import N_CTX, SAME, divergences

Start = Callable[..., LlamaEngine]

EXPERTS = r"blk\.{}\.ffn_(up|down|gate|gate_up)_exps"


class Override(ctypes.Structure):
    """llama_model_tensor_buft_override of llama.h."""

    _fields_ = (("pattern", ctypes.c_char_p), ("buft", ctypes.c_void_p))


def test_the_struct_carries_what_was_chosen() -> None:
    placement = Placement(
        gpu_layers=7,
        n_cpu_moe=2,
        tensor_split=(3.0, 1.0),
        split_mode="row",
        main_gpu=1,
        overrides=(("attn_k", "CPU"),),
    )
    params = ModelParams(placement, mtp=False, mmap=True)
    struct = params.struct
    assert (struct.n_gpu_layers, struct.main_gpu, struct.load_mtp) == (7, 1, False)
    assert struct.split_mode == llama_cpp.LLAMA_SPLIT_MODE_ROW
    shares = [struct.tensor_split[i] for i in range(llama_cpp.llama_max_devices())]
    assert shares == [3.0, 1.0, *[0.0] * (len(shares) - 2)]
    overrides = ctypes.cast(struct.tensor_buft_overrides, ctypes.POINTER(Override))  # type: ignore[arg-type]
    patterns = [b"attn_k", *(EXPERTS.format(i).encode() for i in range(2))]
    assert [overrides[i].pattern for i in range(4)] == [*patterns, None]
    assert [overrides[i].buft for i in range(4)] == [*[buffer_types()["CPU"]] * 3, None]


def test_what_nobody_chose_is_left_to_llama_cpp() -> None:
    struct = ModelParams(Placement(), mtp=True, mmap=True).struct
    default = llama_cpp.llama_model_default_params()
    assert (struct.n_gpu_layers, struct.tensor_buft_overrides) == (ALL_LAYERS, None)
    assert not struct.tensor_split
    assert (struct.split_mode, struct.main_gpu) == (default.split_mode, default.main_gpu)


def test_llama_cpp_puts_the_named_tensors_where_they_are_to_go(demo_gguf: Path) -> None:
    log: list[str] = []
    callback = llama_cpp.llama_log_callback(lambda level, text, data: log.append(text.decode(errors="replace")))
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    placement = Placement(n_cpu_moe=4, overrides=((r"attn_(q|k)\.", "CPU"),))
    try:
        params = ModelParams(placement, mtp=True, mmap=True)
        llama_cpp.llama_model_free(llama_cpp.llama_model_load_from_file(str(demo_gguf).encode(), params.struct))
    finally:
        silence()
    moved = set(re.findall(r"tensor (\S+) .*buffer type overridden to CPU", "".join(log)))
    with GGUFSource(demo_gguf) as source:
        names = [spec.name for spec in source.specs]
    experts = {name for name in names if name.is_expert and name.layer is not None and name.layer < 4}
    assert experts
    assert moved == experts | {name for name in names if name.role in ("attn_q", "attn_k")}


def test_a_buffer_type_that_is_not_there_is_named_with_those_that_are(demo_gguf: Path, start: Start) -> None:
    with pytest.raises(ModelLoadFailed, match=r"exps=CUDA7: there is no buffer type 'CUDA7'") as caught:
        start(demo_gguf, placement=Placement(overrides=(("exps", "CUDA7"),)))
    assert caught.value.hint == f"This llama-cpp-python has on this machine: {', '.join(buffer_types())}."
    assert "CPU" in buffer_types()


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"placement": Placement(n_cpu_moe=8, overrides=(("attn", "CPU"),), tensor_split=(1.0, 2.0), split_mode="row")},
        {"attention": Attention("q8_0", "q8_0")},
        {"attention": Attention("q5_1", "iq4_nl", "on")},
        {"attention": Attention("bf16", "f32")},
        {"attention": Attention("q8_0", "f16", "off")},
        {"ubatch": 32},
        {"ubatch": 100},
        {"ubatch": 1024, "attention": Attention("q8_0", "q4_0")},
    ],
    ids=str,
)
def test_the_text_is_the_same_and_drafts_are_right(demo_gguf: Path, start: Start, options: dict[str, object]) -> None:
    """The embedded model is sure of its answers: what four bits change in its logits is less than what divides them."""
    plain, other = start(demo_gguf, n_ctx=1024, draft=0), start(demo_gguf, n_ctx=1024, draft=3, **options)
    for text in (question("What is 347 + 286?"), question("How many 'r's are in the word strawberry?") * 3):
        expected, (tokens, finished) = run(plain, plain.tokenize(text))[0], run(other, other.tokenize(text))
        assert tokens == expected
        assert finished.timings.accepted[0] > 0.8 * finished.timings.drafted[0] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("attention", "ubatch", "n_parallel", "draft"),
    [
        (Attention("q8_0", "q4_0"), 64, 2, 3),
        (Attention("q8_0", flash_attn="off"), 32, 1, 0),
    ],
    ids=str,
)
def test_states_come_back_whatever_the_cache_is_made_of_and_the_batches_are(
    random_model: Path, start: Start, attention: Attention, ubatch: int, n_parallel: int, draft: int
) -> None:
    """Against a context of the same types that reads each prompt anew, in batches of 512."""
    options = {"n_ctx": N_CTX, "n_parallel": n_parallel, "draft": draft, "attention": attention, "ubatch": ubatch}
    engine, fresh = start(random_model, **options), FreshContext(random_model, N_CTX, attention)
    result, cached, total = divergences(engine, fresh, n_parallel, 3)
    fresh.close()
    assert max(result) < SAME
    assert cached > total / 4, "too little was reused: the test says little"


def test_a_sequence_takes_the_bytes_of_its_types(random_model: Path) -> None:
    sizes = []
    for attention in (Attention(), Attention("q8_0", "q8_0"), Attention("q8_0", "q4_0")):
        fresh = FreshContext(random_model, 512, attention)
        assert fresh.context.decode([DecodeRows(0, 0, list(range(3, 303)), 1)]) == 0
        sizes.append(fresh.context.n_bytes(0))
        fresh.close()
    # 32 values: 64 bytes in F16, 34 in Q8_0, 18 in Q4_0. What is told of each cell and layer besides cancels.
    assert (sizes[0] - sizes[1]) / (sizes[0] - sizes[2]) == (2 * 64 - 34 - 34) / (2 * 64 - 34 - 18)


def test_the_disk_cache_of_other_types_is_not_looked_at(demo_gguf: Path, start: Start, tmp_path: Path) -> None:
    q8 = Attention("q8_0", "q8_0")
    prompt, answers = [], []
    for attention, is_found in ((Attention(), False), (q8, False), (q8, True), (Attention(flash_attn="off"), False)):
        engine = start(demo_gguf, n_ctx=1024, cache_folder=tmp_path, attention=attention)
        prompt = engine.tokenize(question("What is 112 + 345?") * 3)
        tokens, finished = run(engine, prompt)
        engine.close()
        answers.append(tokens)
        assert (finished.timings.n_cached > 0) == is_found
    assert answers == [answers[0]] * 4
    assert len(list(tmp_path.iterdir())) == 3
