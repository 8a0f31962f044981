"""Options that say where a model goes: refused if they make no sense, chosen if they are not given, and then said."""

from __future__ import annotations

import io
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from stepgguf.cli.main import main
from stepgguf.files.byte_sizes import MIB
from stepgguf.fit.machine import probe_machine
from stepgguf.fit.memory import GPU_RESERVE
from stepgguf.runtime.llama import LlamaEngine, LlamaOptions
from stepgguf.runtime.llama_build import Gpu, probe_build
from stepgguf.runtime.llamaserver import ServerOptions
from stepgguf.runtime.placement import ALL_LAYERS, Attention, Placement

ASK = ["-p", "What is 2 + 3?", "--temperature", "0", "--threads", "1"]


@pytest.fixture(autouse=True)
def _nothing_piped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO())


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[LlamaOptions]:
    """What engines are started with, in order."""
    started: list[LlamaOptions] = []
    init = LlamaEngine.__init__

    def note(self: LlamaEngine, path: Path, options: LlamaOptions, **more: object) -> None:
        started.append(options)
        init(self, path, options, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(LlamaEngine, "__init__", note)
    return started


def with_cards(monkeypatch: pytest.MonkeyPatch, *free: int) -> None:
    """An engine that sees cards with so many bytes free beyond what is left to others. What it loads stays in RAM."""
    cards = tuple(Gpu("GPU", GPU_RESERVE + 2 * n_bytes, GPU_RESERVE + n_bytes) for n_bytes in free)
    machine, build = replace(probe_machine(), system="Linux", gpus=cards), replace(probe_build(), gpus=cards)
    monkeypatch.setattr("stepgguf.fit.machine.probe_machine", lambda: machine)
    monkeypatch.setattr("stepgguf.runtime.llama_build.probe_build", lambda: build)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--flash-attn", "off", "--cache-type-v", "q8_0"], "values in q8_0 need flash attention"),
        (["--ctx", "63"], "'63' is not a number from 64 on, nor auto"),
        (["--ctx", "long"], "'long' is not a number from 64 on, nor auto"),
        (["--n-cpu-moe", "-1"], "'-1' is not a number from 0 on, nor auto"),
        (["--gpu-layers", "most"], "'most' is not a number from 0 on, nor auto or all"),
        (["--tensor-split", "1,x"], "'1,x' are no shares"),
        (["--tensor-split", "0,0"], "'0,0' are no shares"),
        (["--tensor-split", "1,nan"], "'1,nan' are no shares"),
        (["--override-tensor", "exps"], "'exps' names no tensors and buffer"),
        (["--override-tensor", "(=CPU"], "'(' is not a regular expression"),
        (["--cache-type-k", "q3_k"], "'q3_k' is not one of 'f32', 'f16'"),
        (["--batch", "512"], "give --ubatch alone"),
        (["--ubatch", "16"], "greater than or equal to 32"),
        (["--engine", "llama-server=http://127.0.0.1:9", "--n-cpu-moe", "3"], "has loaded its model"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_makes_no_sense_is_refused(
    demo_gguf: Path, options: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["chat", str(demo_gguf), *ASK, *options]) == 2
    assert message in re.sub(r"[\s│]+", " ", capfd.readouterr().err)


def test_a_batch_holds_a_token_and_its_guesses_of_each_request(
    demo_gguf: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", str(demo_gguf), "--port", "0", "--parallel", "16", "--ubatch", "63"]) == 2
    said = re.sub(r"[\s│]+", " ", capfd.readouterr().err)
    assert "16 requests decode up to 64 tokens at a time, a batch holds 63" in said


def test_options_reach_the_engine_and_nothing_is_said_where_nothing_was_chosen(
    demo_gguf: Path, loaded: list[LlamaOptions], capfd: pytest.CaptureFixture[str]
) -> None:
    options = ["--cache-type-k", "q8_0", "--cache-type-v", "q4_0", "--flash-attn", "on", "--ubatch", "64"]
    places = ["--override-tensor", "exps=CPU", "--override-tensor", "attn=CPU", "--n-cpu-moe", "3"]
    split = ["--tensor-split", "3,1", "--split-mode", "row", "--main-gpu", "1", "--gpu-layers", "all"]
    assert main(["chat", str(demo_gguf), *ASK, *options, *places, *split]) == 0
    captured = capfd.readouterr()
    assert captured.out == "2 + 3 = 5\n"
    assert len(captured.err.splitlines()) == 1, "the speed, as ever"
    assert loaded[0].attention == Attention("q8_0", "q4_0", "on")
    assert loaded[0].ubatch == 64
    assert loaded[0].placement == Placement(
        gpu_layers=ALL_LAYERS,
        n_cpu_moe=3,
        tensor_split=(3.0, 1.0),
        split_mode="row",
        main_gpu=1,
        overrides=(("exps", "CPU"), ("attn", "CPU")),
    )


def test_the_longest_context_that_fits_is_taken_and_said(
    demo_gguf: Path, loaded: list[LlamaOptions], capfd: pytest.CaptureFixture[str]
) -> None:
    for quiet in ([], ["-q"]):
        assert main(["chat", str(demo_gguf), *ASK, "--ctx", "auto", *quiet]) == 0
        assert capfd.readouterr().err.count("4,096 tokens of context\n") == (not quiet)
    assert [options.n_ctx for options in loaded] == [4096, 4096]


def test_on_cards_experts_and_layers_are_placed_by_what_is_free_and_a_line_says_how(
    demo_gguf: Path, loaded: list[LlamaOptions], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with_cards(monkeypatch, 20 * MIB, 24 * MIB)
    said = []
    for more in ([], ["--n-cpu-moe", "5"], ["--tensor-split", "1,1"], ["-q"]):
        assert main(["chat", str(demo_gguf), *ASK, "--ctx", "1024", *more]) == 0
        captured = capfd.readouterr()
        assert captured.out == "2 + 3 = 5\n"
        said.append(captured.err.splitlines())
    chosen = [options.placement for options in loaded]
    counts = "/".join(f"{share:g}" for share in chosen[0].tensor_split or ())
    assert said[0][0] == f"{counts} layers on the 2 cards, 1,024 tokens of context"
    assert sum(chosen[0].tensor_split or ()) == 5 + 3 + 1, "layers, MTP blocks and the output"
    assert chosen[1].n_cpu_moe == 5
    assert said[1][0].startswith("experts of 5 of 5 layers in RAM, ")
    assert chosen[2].tensor_split == (1.0, 1.0)
    assert said[3] == []
    assert chosen[3] == chosen[0]


def test_doctor_takes_the_same_options(
    demo_gguf: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    needs = []
    for options in ([], ["--cache-type-k", "q8_0", "--cache-type-v", "q8_0"], ["--ubatch", "2048"]):
        assert main(["doctor", str(demo_gguf), "--json", *options]) == 0
        needs.append(json.loads(capfd.readouterr().out)["need"])
    assert needs[1]["kv"] / needs[0]["kv"] == 34 / 64
    assert needs[2]["compute"] > 3 * needs[0]["compute"]
    with_cards(monkeypatch, 8 * MIB)
    main(["doctor", str(demo_gguf), "--n-cpu-moe", "0", "--gpu-layers", "all"])
    text = capfd.readouterr().out
    assert re.search(r"^fail  memory .* but not where it was to go\n +stepgguf chat \S+ --", text, re.MULTILINE)


def test_llama_server_gets_the_same_in_its_own_words() -> None:
    placement = Placement(
        gpu_layers=ALL_LAYERS,
        n_cpu_moe=3,
        tensor_split=(3.0, 1.5),
        split_mode="row",
        main_gpu=1,
        overrides=(("exps", "CPU"), ("attn", "CUDA0")),
    )
    options = ServerOptions(placement=placement, attention=Attention("q8_0", "q4_0", "on"), batch=2048, ubatch=256)
    line = " ".join(options.arguments())
    for words in (
        "--gpu-layers all --n-cpu-moe 3 --tensor-split 3,1.5 --split-mode row --main-gpu 1",
        "--override-tensor exps=CPU --override-tensor attn=CUDA0",
        "--cache-type-k q8_0 --cache-type-v q4_0 --flash-attn on",
        "--batch-size 2048 --ubatch-size 256",
    ):
        assert words in line
    assert ServerOptions().arguments() == ["--parallel", "1", "--no-webui"], "it chooses the rest itself"
