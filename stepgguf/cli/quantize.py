"""stepgguf quantize: a GGUF or a checkpoint in, GGUF out, the same loop as convert."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from stepgguf.cli import arguments
from stepgguf.cli.destinations import Destination


def quantize(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SRC",
            help=f"A GGUF (of a split one, any of its files) or a checkpoint directory; {arguments.ON_HUB}.",
        ),
    ],
    dest: arguments.Dest,
    positional_type: Annotated[
        str | None, typer.Argument(metavar="[TYPE]", help="The same as --type, where llama-quantize has it.")
    ] = None,
    positional_threads: Annotated[
        int | None, typer.Argument(metavar="[THREADS]", min=0, help="The same as --threads; 0 is all cores.")
    ] = None,
    type: arguments.Type = None,
    fit: arguments.Fit = None,
    target_bpw: arguments.TargetBpw = None,
    min_tps: arguments.MinTps = None,
    bandwidth: arguments.Bandwidth = None,
    mtp_type: arguments.MtpType = None,
    allow_requantize: Annotated[
        bool, typer.Option("--allow-requantize", help="Accept a source that is quantized already (its error stays).")
    ] = False,
    imatrix: arguments.ImatrixFile = None,
    imatrix_prior: arguments.ImatrixPriorOption = "pooled",
    calibrate: arguments.Calibrate = None,
    calibrate_tokens: arguments.CalibrateTokens = None,
    costs: arguments.Costs = None,
    device: arguments.Device = "cpu",
    kernel: arguments.Kernel = "lanes",
    split_max_size: arguments.SplitMaxSize = None,
    threads: arguments.Threads = None,
    memory: arguments.Memory = None,
    keep: arguments.Keep = None,
    dry_run: arguments.DryRun = False,
    restart: arguments.Restart = False,
    overwrite: arguments.Overwrite = False,
    quiet: arguments.Quiet = False,
    json: arguments.Json = False,
) -> None:
    """Quantize a GGUF (F32, F16, BF16; whole or split) or a checkpoint, byte for byte as llama-quantize does.

    The metadata is kept. A source that is quantized already is refused: its error would stay.

    Examples:

    - `stepgguf quantize step-bf16.gguf step-q5_k_m.gguf --type Q5_K_M`
    - `stepgguf quantize step-bf16.gguf step-q5_k_m.gguf Q5_K_M 16`
    - `stepgguf quantize step-bf16-00001-of-00009.gguf step-iq3_xxs.gguf --type IQ3_XXS --imatrix imatrix.gguf`
    - `stepgguf quantize Step-3.5-Flash/ step.gguf --type my-recipe.toml --dry-run`
    - `stepgguf quantize hf:stepfun-ai/Step-3.5-Flash-GGUF/step-bf16-00001-of-00009.gguf models/ --type Q4_K_M`
    - `stepgguf quantize step-q8_0.gguf step-q4_k_s.gguf --type Q4_K_S --allow-requantize`
    """
    from stepgguf.cli.conversion import RunOptions, carry_out
    from stepgguf.cli.conversion_plan import calibrating, choose_recipe, kept_folder, make_plan
    from stepgguf.convert.plan import Options
    from stepgguf.convert.sources.opening import open_source

    _refuse_type_as_dest(source, dest)
    if positional_type is not None and type is not None and positional_type != type:
        raise typer.BadParameter(f"{type} and {positional_type}: give one type", param_hint="--type")
    threads = threads or positional_threads or None
    kept = kept_folder(keep, source, dry_run=dry_run)
    how = RunOptions(threads, memory, dry_run, restart, overwrite, quiet, json, costs, kept)
    limits = arguments.read_budget(fit, target_bpw, min_tps, bandwidth)
    recipe, limits = choose_recipe(type or positional_type, limits, source, arguments.DEFAULT_TYPE)
    options = Options(
        recipe,
        mtp_type=mtp_type,
        split_max_size=split_max_size,
        allow_requantize=allow_requantize,
        importance=arguments.read_importance(imatrix, imatrix_prior),
        kernel=kernel,
    )
    with open_source(source, how.kept) as opened:
        file = dest.file_path(f"{opened.name}-{recipe.name}")
        with calibrating(opened, calibrate, calibrate_tokens, device, file, how) as calibration:
            options = replace(options, calibration=None if calibration is None else calibration.label)
            plan = make_plan(opened, file, options, limits, how, calibration)
            carry_out(plan, opened, dest, how, calibration)


def _refuse_type_as_dest(source: Path, dest: Destination) -> None:
    """OutputError for `quantize SRC TYPE`, as llama-quantize allows it: here it would become a file's name."""
    from stepgguf.errors import OutputError
    from stepgguf.quants.mixtures import BASE_TYPES

    if dest.text.upper() in BASE_TYPES and not dest.is_folder:
        command = ["stepgguf", "quantize", str(source), f"{source.stem}-{dest.text}.gguf", "--type", dest.text]
        raise OutputError(f"{dest.text} is a type; the name of the file to write is missing", hint=shlex.join(command))
