"""stepgguf convert: safetensors in, quantized GGUF out, one pass."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from stepgguf.cli import arguments
from stepgguf.convert import MtpMode


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SRC", help="Directory with config.json and *.safetensors, or hf:ORG/NAME[@REVISION] on the Hub."
        ),
    ],
    dest: arguments.Dest,
    type: arguments.Type = None,
    fit: arguments.Fit = None,
    target_bpw: arguments.TargetBpw = None,
    min_tps: arguments.MinTps = None,
    bandwidth: arguments.Bandwidth = None,
    mtp: Annotated[MtpMode, typer.Option(help="Where the MTP (multi-token prediction) blocks go.")] = "include",
    mtp_type: arguments.MtpType = None,
    chat_template: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, metavar="FILE", help="Use this template and not the checkpoint's."),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="general.name. Default: what the model card says, or the directory's name."),
    ] = None,
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
    """Convert a published Step-3.5 / Step-3.7 checkpoint (BF16 or FP8) to a quantized GGUF in one pass.

    No intermediate file is written. Interrupt it as you like: the same command goes on where it stopped, and the
    result is the same to the byte. From the Hugging Face Hub the weights are read as they are needed: 394 GB pass
    through the network and none of them through the disk, unless --keep says where they shall stay.

    Examples:

    - `stepgguf convert Step-3.5-Flash/ step-q4_k_s.gguf --type Q4_K_S`
    - `stepgguf convert Step-3.5-Flash-FP8/ models/ --type IQ4_XS --split-max-size 50G`
    - `stepgguf convert Step-3.5-Flash/ step-128gb.gguf --type 128gb --imatrix imatrix.gguf`
    - `stepgguf convert hf:stepfun-ai/Step-3.5-Flash step.gguf --type Q4_K_S`
    - `stepgguf convert hf:stepfun-ai/Step-3.5-Flash step.gguf --type Q4_K_S --keep Step-3.5-Flash/`
    - `stepgguf convert Step-3.5-Flash/ step.gguf --fit 104GiB --imatrix imatrix.gguf --dry-run`
    - `stepgguf convert Step-3.5-Flash/ step.gguf --type Q3_K_M --imatrix imatrix.gguf --calibrate default`
    """
    from stepgguf.chat.template import ChatTemplate, read_template
    from stepgguf.cli.conversion import RunOptions, carry_out
    from stepgguf.cli.conversion_plan import calibrating, choose_recipe, kept_folder, make_plan
    from stepgguf.convert.metadata import CHAT_TEMPLATE
    from stepgguf.convert.plan import Options
    from stepgguf.convert.sources.checkpoint import Checkpoint
    from stepgguf.convert.sources.checkpoint_place import open_place

    if chat_template is not None:
        read_template(chat_template)  # tried before anything is written
    kept = kept_folder(keep, source, dry_run=dry_run)
    how = RunOptions(threads, memory, dry_run, restart, overwrite, quiet, json, costs, kept)
    limits = arguments.read_budget(fit, target_bpw, min_tps, bandwidth)
    recipe, limits = choose_recipe(type, limits, source, arguments.DEFAULT_TYPE)
    options = Options(
        recipe,
        mtp,
        mtp_type,
        split_max_size,
        chat_template,
        name,
        importance=arguments.read_importance(imatrix, imatrix_prior),
        kernel=kernel,
    )
    with Checkpoint(open_place(source, how.kept)) as checkpoint:
        file = dest.file_path(f"{name or checkpoint.name}-{recipe.name}")
        with calibrating(checkpoint, calibrate, calibrate_tokens, device, file, how) as calibration:
            options = replace(options, calibration=None if calibration is None else calibration.label)
            plan = make_plan(checkpoint, file, options, limits, how, calibration)
            carried = [key.value for key in plan.files[0].keys if key.name == CHAT_TEMPLATE]
            if carried and chat_template is None:
                ChatTemplate(carried[0]).probe()
            carry_out(plan, checkpoint, dest, how, calibration)
