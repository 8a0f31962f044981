"""stepgguf setup: install what running a model needs, built for this machine's GPU. The work is setup/'s."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from stepgguf.setup import GpuChoice

if TYPE_CHECKING:
    from stepgguf.setup.plan import Step


def setup(
    gpu: Annotated[
        GpuChoice,
        typer.Option(
            help="What runs the model. By default what does already, or what this machine has: CUDA for NVIDIA, Metal "
            "for a Mac, Vulkan for Strix Halo, else the CPU (none)."
        ),
    ] = "auto",
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Build the engine again even if it is built for this already.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the commands, and run none of them.")] = False,
) -> None:
    """Install what running a model needs, and build the engine (llama-cpp-python) for this machine's GPU.

    It goes into the environment that stepgguf itself is in. The engine is built from its source, whatever pip has kept
    of earlier builds; CMAKE_ARGS, CC and CXX are passed on to the build. The exit code is 1 if the GPU that was asked
    for is not used in the end.

    Examples:

    - `stepgguf setup`
    - `stepgguf setup --gpu vulkan`
    - `stepgguf setup --rebuild --dry-run`
    """
    from stepgguf.cli import output
    from stepgguf.cli.doctor import finding_lines
    from stepgguf.fit.examine import engine_findings
    from stepgguf.fit.machine import probe_machine
    from stepgguf.setup.engine import probe_engine
    from stepgguf.setup.plan import choose_backend, plan_steps
    from stepgguf.setup.requirements import run_requirements
    from stepgguf.setup.tools import Host

    machine = probe_machine()
    engine, requirements = probe_engine(), run_requirements()
    backend = choose_backend(gpu, machine, engine)
    steps = plan_steps(backend, Host(machine.system, os.environ), machine, requirements, engine, rebuild=rebuild)
    if dry_run:
        output.print_lines(map(str, steps))
    if not steps:
        output.note("everything is installed, and the engine is built for this machine; --rebuild builds it again")
    if dry_run:
        return
    if steps:
        _run_steps(steps)
        engine = probe_engine()
    findings = list(engine_findings(machine, engine.build, backend)) if engine.build else [engine.verdict]
    sys.stdout.write("".join(map(finding_lines, findings)))
    if any(finding.level == "fail" for finding in findings):
        raise typer.Exit(1)


def _run_steps(steps: list[Step]) -> None:
    """Run them one after the other, each under a bar, with all of their output in one log. Ctrl+C exits with 130."""
    from stepgguf.cli import output
    from stepgguf.cli.build_meter import BuildMeter
    from stepgguf.files import folders
    from stepgguf.setup.run import run_step

    log = folders.setup_log()
    log.unlink(missing_ok=True)
    for step in steps:
        try:
            with BuildMeter(step.title) as meter:
                run_step(step, log, meter.show)
        except KeyboardInterrupt:
            output.note("interrupted; what was installed before is left as it was")
            raise typer.Exit(130) from None
