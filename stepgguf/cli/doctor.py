"""stepgguf doctor: can this machine run this model well? The rules are fit/examine.py's."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stepgguf.cli import arguments, engine_options, loading, memory_options
from stepgguf.errors import BadMetadata, StepggufError
from stepgguf.runtime.engine import DEFAULT_CACHE_RAM

if TYPE_CHECKING:
    from stepgguf.fit.capacity import Finding
    from stepgguf.fit.examine import PromptEnd
    from stepgguf.fit.machine import Machine
    from stepgguf.fit.memory import ContextParams
    from stepgguf.fit.model_file import ModelFile
    from stepgguf.runtime.llama_build import LlamaBuild


def doctor(
    path: Annotated[
        Path | None, typer.Argument(metavar="FILE.gguf", help="The model to run; of a split one, any of its files.")
    ] = None,
    ctx: memory_options.Ctx = None,
    parallel: Annotated[int, typer.Option(min=1, metavar="N", help="Requests at the same time.")] = 1,
    mtp_file: engine_options.MtpFile = None,
    gpu_layers: memory_options.GpuLayers = None,
    n_cpu_moe: memory_options.CpuMoe = None,
    override_tensor: memory_options.OverrideTensor = None,
    tensor_split: memory_options.TensorSplit = None,
    split_mode: memory_options.SplitMode = "layer",
    main_gpu: memory_options.MainGpu = 0,
    cache_type_k: memory_options.CacheTypeK = "f16",
    cache_type_v: memory_options.CacheTypeV = "f16",
    flash_attn: memory_options.FlashAttn = "auto",
    ubatch: memory_options.Ubatch = None,
    cache_ram: engine_options.CacheRam = DEFAULT_CACHE_RAM,
    json: arguments.Json = False,
) -> None:
    """Say whether this machine can run a model well, and how to fix what is in the way.

    With options of chat and serve it says whether they would load the model so. The exit code is 0 unless something
    fails.

    Examples:

    - `stepgguf doctor`
    - `stepgguf doctor step-q4_k_s.gguf`
    - `stepgguf doctor step-q4_k_s.gguf --ctx 131072 --parallel 2`
    - `stepgguf doctor step-q4_k_s.gguf --ctx auto --cache-type-k q8_0 --cache-type-v q8_0`
    """
    from stepgguf.cli import output
    from stepgguf.fit.capacity import Finding
    from stepgguf.fit.choice import choose
    from stepgguf.fit.examine import examine, examine_folders
    from stepgguf.fit.machine import probe_machine
    from stepgguf.fit.model_file import read_model_file
    from stepgguf.runtime.llama_build import probe_build

    options = engine_options.EngineOptions(
        ctx=ctx,
        parallel=parallel,
        placement=memory_options.read_placement(
            gpu_layers, n_cpu_moe, override_tensor, tensor_split, split_mode, main_gpu
        ),
        attention=memory_options.read_attention(cache_type_k, cache_type_v, flash_attn),
        ubatch=ubatch,
        cache_ram=cache_ram,
    )
    failures: list[Finding] = []  # what could not be probed is a finding too, and the rest is still examined
    machine, build, model, context, prompt_end = probe_machine(), None, None, None, None
    try:
        build = probe_build()
    except StepggufError as error:
        failures.append(Finding("fail", "engine", error.message, error.hint))
    try:
        model = read_model_file(path, mtp_file) if path is not None else None
    except StepggufError as error:
        failures.append(Finding("fail", "file", error.message, error.hint))
    if model is not None:
        draft = None if build is None or build.mtp else 0  # it could not
        asked = replace(options, draft=draft)
        choice = choose(
            machine, build, model, loading.context_params(model, asked), longest=ctx == memory_options.LONGEST
        )
        context = choice.context
        prompt_end = find_prompt_end(model.template)
    findings = [*examine(machine, build, model, context, prompt_end), examine_folders(), *failures]
    if json:
        output.print_json(json_report(machine, build, model, context, findings))
    else:
        sys.stdout.write("".join(map(finding_lines, findings)))
    if any(finding.level == "fail" for finding in findings):
        raise typer.Exit(1)


def find_prompt_end(template: str | None) -> PromptEnd:
    """Where the prompts of a chat template end, or what is wrong with it."""
    from stepgguf.chat.template import ChatTemplate, prompt_ending

    if template is None:
        return BadMetadata("the file has no chat template, so it cannot chat")
    try:
        return prompt_ending(ChatTemplate(template).probe())
    except StepggufError as error:
        return error


def finding_lines(finding: Finding) -> str:
    """The finding in one line, and its fix below."""
    text = f"{finding.level:<4}  {finding.subject:<9}  {finding.message}\n"
    return text + f"{'':17}{finding.fix}\n" if finding.fix else text


def json_report(
    machine: Machine,
    build: LlamaBuild | None,
    model: ModelFile | None,
    context: ContextParams | None,
    findings: Sequence[Finding],
) -> dict[str, Any]:
    """The probes and the findings as data; sizes in bytes."""
    from stepgguf.fit.memory import memory_budget, memory_need

    result: dict[str, Any] = {
        "ok": all(finding.level != "fail" for finding in findings),
        "findings": [asdict(finding) for finding in findings],
        "machine": {**asdict(machine), "kind": machine.kind, "features": sorted(machine.features)},
        "engine": build and {**asdict(build), "features": sorted(build.features), "backends": sorted(build.backends)},
        "budget": asdict(memory_budget(machine, build.gpus if build else ())),
    }
    if model is not None and context is not None:
        needed = memory_need(model.footprint, context)
        result["need"] = {"n_ctx": context.n_ctx, "n_parallel": context.n_parallel, **asdict(needed)}
        result["need"]["total"] = needed.total
    return result
