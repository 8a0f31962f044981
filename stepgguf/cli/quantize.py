"""stepgguf quantize: GGUF in, GGUF out, the same loop as convert."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stepgguf.cli import arguments


def quantize(
    source: arguments.Gguf,
    dest: Annotated[Path, typer.Argument(metavar="DEST", help="The GGUF to write.")],
    type: arguments.Type = "Q4_K_S",
    mtp_type: arguments.MtpType = None,
    allow_requantize: Annotated[
        bool, typer.Option("--allow-requantize", help="Accept a source that is quantized already (its error stays).")
    ] = False,
    split_max_size: arguments.SplitMaxSize = None,
    threads: arguments.Threads = None,
    memory: arguments.Memory = 2 * 2**30,
    dry_run: arguments.DryRun = False,
    restart: arguments.Restart = False,
    overwrite: arguments.Overwrite = False,
    quiet: arguments.Quiet = False,
    json: arguments.Json = False,
) -> None:
    """Quantize a GGUF (F32, F16, BF16; whole or split) to another type, byte for byte as llama-quantize does.

    Examples:

    - `stepgguf quantize step-bf16.gguf step-q5_k_m.gguf --type Q5_K_M`
    - `stepgguf quantize step-bf16-00001-of-00009.gguf step-iq4_xs.gguf --type IQ4_XS`
    - `stepgguf quantize step-q8_0.gguf step-q4_k_s.gguf --type Q4_K_S --allow-requantize`
    """
    from stepgguf.cli.converting import Run
    from stepgguf.convert.ggufsource import GGUFSource
    from stepgguf.convert.plan import Options, plan_gguf
    from stepgguf.errors import OutputError
    from stepgguf.quants.mixtures import check_name

    options = Options(
        check_name(type), mtp_type=mtp_type, split_max_size=split_max_size, allow_requantize=allow_requantize
    )
    if dest.is_dir():
        dest = dest / f"{source.stem}-{options.type_name}.gguf"
    with GGUFSource(source) as gguf:
        plan = plan_gguf(gguf, dest, options)
        if {file.path.resolve() for file in plan.files} & {header.path.resolve() for header in gguf.headers}:
            raise OutputError(f"{dest} is the source", hint="Write to another name.")
        run = Run(plan, gguf, quiet=quiet, json=json)
        if dry_run:
            run.show_plan()
        else:
            run.execute(restart=restart, overwrite=overwrite, threads=threads, memory=memory)
