"""stepgguf verify: is this file what was made?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stepgguf.cli import arguments
from stepgguf.convert import MtpMode
from stepgguf.files.byte_sizes import readable_size

if TYPE_CHECKING:
    from stepgguf.convert.verify import Verification

MOST_SHOWN = 20  # problems; --json has all


def verify(
    path: arguments.Gguf,
    against: Annotated[
        Path | None,
        typer.Option(
            metavar="SRC",
            help=f"Make the tensors again from this checkpoint or GGUF and compare; {arguments.ON_HUB}.",
        ),
    ] = None,
    all: Annotated[bool, typer.Option("--all", help="With --against: every row and not a sample.")] = False,
    sample: Annotated[
        float,
        typer.Option(
            min=0.0,
            max=1.0,
            metavar="N",
            help="With --against: the share of each tensor to compare, at least one unit.",
        ),
    ] = 0.01,
    imatrix: arguments.ImatrixFile = None,
    imatrix_prior: arguments.ImatrixPriorOption = "pooled",
    quiet: arguments.Quiet = False,
    json: arguments.Json = False,
) -> None:
    """Check a file's bytes against the manifest that convert wrote beside it, or against the source.

    The exit code is 0 if all is well and 1 if not; what differs is named down to the expert.

    Examples:

    - `stepgguf verify step-q4_k_s.gguf`
    - `stepgguf verify step-q4_k_s.gguf --against Step-3.5-Flash/`
    - `stepgguf verify step-q4_k_s.gguf --against Step-3.5-Flash/ --all`
    - `stepgguf verify step-iq3_s.gguf --against Step-3.5-Flash/ --imatrix imatrix.gguf`
    """
    from stepgguf.cli import output
    from stepgguf.cli.progress import ProgressMeter
    from stepgguf.convert.plan import Options
    from stepgguf.convert.planner import plan_source
    from stepgguf.convert.sources.opening import open_source
    from stepgguf.convert.sources.splits import read_headers
    from stepgguf.convert.verify import verify_manifest, verify_source
    from stepgguf.quants.recipe_files import load_recipe

    importance = arguments.read_importance(imatrix, imatrix_prior)
    tensors = [tensor for header in read_headers(path) for tensor in header.tensors]
    mtp: MtpMode = "include" if any(".nextn." in tensor.name for tensor in tensors) else "drop"
    total = sum(tensor.n_bytes for tensor in tensors)
    with ProgressMeter("verify", total, quiet=quiet) as meter:
        if against is None:
            report = verify_manifest(path, meter.add_bytes)
        else:
            options = Options(load_recipe("F32"), mtp, allow_requantize=True, importance=importance)
            with open_source(against) as source:
                plan = plan_source(source, path, options)
                report = verify_source(path, plan, source, 1.0 if all else sample, meter.add_bytes)
    if json:
        output.print_json({"ok": not report.problems, "tensors": report.tensors, "units": report.units,
                     "bytes": report.n_bytes, "problems": list(report.problems)})  # fmt: skip
    else:
        _show_report(report, quiet)
    if report.problems:
        raise typer.Exit(1)


def _show_report(report: Verification, quiet: bool) -> None:
    """Show the first problems, and how much was compared."""
    from stepgguf.cli import output

    for problem in report.problems[:MOST_SHOWN]:
        output.error(problem, None)
    if not quiet:
        compared = f"{report.tensors} tensors, {readable_size(report.n_bytes)} compared"
        output.note(f"{compared}: {output.counted(len(report.problems), 'difference')}")
