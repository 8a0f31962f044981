"""What is to be run so that this machine's GPU runs models.

    machine, --gpu  ->  backend  ->  tools  ->  build and install  ->  the commands, with their environment

What is already there is asked first. Nothing is changed here.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field

from packaging.requirements import Requirement

from stepgguf.errors import SetupError
from stepgguf.fit.backends import BACKENDS, BackendName, cmake_arguments, wanted_backend
from stepgguf.fit.machine import Machine
from stepgguf.setup import GpuChoice, installer
from stepgguf.setup.engine import InstalledEngine
from stepgguf.setup.requirements import are_met, engine_requirement
from stepgguf.setup.tools import Host, find_tools


@dataclass(frozen=True, slots=True)
class Step:
    """A command to run. environment: the variables that are set for it, beside those that are there."""

    title: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """The line that does the same in a shell."""
        variables = (f"{name}={shlex.quote(value)}" for name, value in self.environment.items())
        return " ".join((*variables, shlex.join(self.command)))


def choose_backend(choice: GpuChoice, machine: Machine, engine: InstalledEngine) -> BackendName:
    """The backend that was chosen; "auto" is the one that uses a GPU already, or else the machine's own.

    Raises SetupError for one that the machine's system does not have.
    """
    if choice == "auto":
        return engine.backend_in_use or wanted_backend(machine)
    system = BACKENDS[choice].system
    if machine.system == "Darwin" and choice == "none":
        raise SetupError(
            "llama-cpp-python is always built with Metal on a Mac",
            hint="stepgguf setup; then keep a model off the GPU with --gpu-layers 0, for example in stepgguf chat.",
        )
    if system != machine.system:
        raise SetupError(f"there is no {BACKENDS[choice].title} on {machine.system}", hint="stepgguf setup --gpu auto")
    return choice


def plan_steps(
    backend: BackendName,
    host: Host,
    machine: Machine,
    requirements: tuple[Requirement, ...],
    engine: InstalledEngine,
    *,
    rebuild: bool = False,
) -> list[Step]:
    """The steps that are lacking; none where everything is there already and `rebuild` does not ask for the engine.

    Raises SetupError for tools that are missing, and where nothing may be installed.
    """
    steps = []
    needed = engine_requirement(requirements)
    if rebuild or not engine.suits(needed, backend):
        variables = find_tools(backend, host)
        cmake = " ".join((*cmake_arguments(backend, machine), host.environ.get("CMAKE_ARGS", ""))).strip()
        title = f"building {needed.name} for {BACKENDS[backend].title}"
        variables |= {"CMAKE_ARGS": cmake} if cmake else {}
        steps.append(Step(title, installer.build_command(needed), variables))
    if steps or not are_met(requirements):
        steps.append(Step("installing the other packages", installer.install_command(requirements)))
    if steps:
        installer.check_installer()
    return steps
