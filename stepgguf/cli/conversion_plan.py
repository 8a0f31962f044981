"""From command-line options to the plan of a conversion: what convert and quantize share, and plan in part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from stepgguf.calibration.work_folder import work_folder
from stepgguf.cli import output
from stepgguf.cli.conversion import RunOptions
from stepgguf.cli.progress import ProgressMeter
from stepgguf.convert import budget
from stepgguf.convert.budget import Limits, PricedTrunk
from stepgguf.convert.cost_file import TypeCosts, read_costs, write_costs
from stepgguf.convert.importance import Importance
from stepgguf.convert.local_models import CALIBRATION_ENDING
from stepgguf.convert.measure import count_sampled_values
from stepgguf.convert.plan import Options, Plan
from stepgguf.convert.planner import plan_source
from stepgguf.convert.sizes import take_inventory, with_near_sizes
from stepgguf.convert.sources.hub import hub_address
from stepgguf.convert.sources.kept_folder import KeptFolder
from stepgguf.convert.sources.opening import open_source
from stepgguf.convert.sources.source import TensorSource
from stepgguf.convert.writer import is_taken, name_taken, require_same_calibration
from stepgguf.errors import StepggufError, UnknownType
from stepgguf.quants.recipe import Recipe

if TYPE_CHECKING:
    from stepgguf.cli.calibrating import CalibrationRun
    from stepgguf.reference import DeviceName


def kept_folder(path: Path | None, source: Path, *, dry_run: bool) -> KeptFolder | None:
    """The folder of --keep, in which a dry run keeps nothing."""
    if path is None:
        return None
    if hub_address(source) is None:
        raise typer.BadParameter(
            f"{source} is on this disk already; files are kept of what is read from the Hub (hf:ORG/NAME)",
            param_hint="--keep",
        )
    return None if dry_run else KeptFolder(path)


def choose_recipe(
    type_name: str | None, limits: Limits | None, source: Path, default: str
) -> tuple[Recipe, Limits | None]:
    """The recipe and the budget. For a type that there is not, the error says what those that come near would take."""
    try:
        return budget.resolve_recipe(type_name, limits, default)
    except UnknownType as error:
        try:
            with open_source(source) as opened:
                raise with_near_sizes(error, take_inventory(opened)) from None
        except StepggufError as other:
            raise other if isinstance(other, UnknownType) else error from None  # one thing at a time


def make_plan(
    source: TensorSource,
    dest: Path,
    options: Options,
    limits: Limits | None,
    how: RunOptions,
    calibration: CalibrationRun | None = None,
) -> Plan:
    """Plan a file; within a budget after measuring what each type loses, if there is a choice.

    With a file of costs, or a calibration that finds them, it is the gradients that say it. A dry run of a calibration
    measures as without, which takes minutes.

    A destination that is taken, and may not be, is refused before anything is measured.
    """
    if limits is None:
        if how.costs is not None:
            raise typer.BadParameter(
                "it needs a budget, such as --fit, for which types are chosen", param_hint="--costs"
            )
        return plan_source(source, dest, options)
    plan = budget.plan_without_measuring(limits, source, dest, options)
    if plan is not None:
        return plan
    if not (how.dry_run or how.overwrite) and is_taken(dest):
        raise name_taken(dest)
    costs = _known_costs(source, dest, options.importance, how, calibration)
    if costs is None:
        trunk = price_trunk(source, dest, options, threads=how.threads, quiet=how.quiet)
    else:
        trunk = budget.price_trunk(source, dest, options, costs=costs)
    return budget.plan_within(limits, source, dest, options, trunk)


def _known_costs(
    source: TensorSource, dest: Path, importance: Importance | None, how: RunOptions, calibration: CalibrationRun | None
) -> TypeCosts | None:
    """What types cost by gradients: of the file, or found now and kept there. None where neither is to be had.

    CostsError for a file that is none of this source, or is lacking without a calibration that would make it.
    """
    if how.costs is not None and (how.costs.exists() or calibration is None):
        return read_costs(how.costs, source, importance)
    if calibration is None or how.dry_run:
        return None
    if not how.restart:
        require_same_calibration(dest, calibration.label)  # the passes would clear what that run has kept
    costs = calibration.find_costs(importance)
    if how.costs is not None:
        write_costs(how.costs, costs, source, importance)
    return costs


def price_trunk(
    source: TensorSource, dest: Path, options: Options, *, threads: int | None, quiet: bool = False
) -> PricedTrunk:
    """Measure what each type costs each tensor. Ctrl+C keeps what is measured and exits with 130."""
    total = sum(count_sampled_values(tensor.shape) for tensor in take_inventory(source).matrices)
    try:
        with ProgressMeter("measuring", 2 * total, quiet=quiet) as meter:  # bytes of BF16
            return budget.price_trunk(
                source,
                dest,
                options,
                threads=threads,
                progress=lambda tensor, kept: meter.add_bytes(2 * count_sampled_values(tensor.shape), earlier=kept),
                compiling=meter.note_compiling,
            )
    except KeyboardInterrupt:
        output.note("interrupted while measuring; repeat the command to go on from there")
        raise typer.Exit(130) from None


@contextmanager
def calibrating(
    source: TensorSource,
    texts: Sequence[str] | None,
    n_tokens: int | None,
    device: DeviceName,
    dest: Path,
    how: RunOptions,
) -> Iterator[CalibrationRun | None]:
    """What --calibrate says, for the block in which its file is planned and made; None without it.

    What an interrupted calibration left is removed first if the run is to start anew.
    """
    folder = dest.with_name(f"{dest.name}{CALIBRATION_ENDING}")
    if how.restart and not how.dry_run and folder.is_dir():
        with work_folder(folder, 0):
            pass
    if not texts:
        if n_tokens is not None:
            raise typer.BadParameter("it needs --calibrate, which says of what text", param_hint="--calibrate-tokens")
        yield None
        return
    from stepgguf.cli.calibrating import CalibrationRun

    with CalibrationRun(
        source, texts, n_tokens, folder, device=device, threads=how.threads, memory=how.memory, quiet=how.quiet
    ) as calibration:
        if not how.quiet:
            calibration.say_what_it_takes()
        yield calibration
