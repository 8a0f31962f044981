"""What the installed engine is, asked in a process of its own: a library that was just replaced is loaded there."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass

from packaging.requirements import Requirement

from stepgguf.errors import SetupError
from stepgguf.fit.backends import BACKENDS, BackendName
from stepgguf.fit.capacity import Finding
from stepgguf.runtime.llama_build import LlamaBuild


@dataclass(frozen=True, slots=True)
class InstalledEngine:
    """build: None where the engine is not installed or cannot be loaded. verdict: what doctor says of it."""

    build: LlamaBuild | None
    verdict: Finding

    @property
    def backend_in_use(self) -> BackendName | None:
        """What it uses a GPU through; None where it uses none."""
        build = self.build
        return next((name for name in BACKENDS if name in build.backends), None) if build and build.gpus else None

    def suits(self, requirement: Requirement, backend: BackendName) -> bool:
        """Whether it is of a version that suffices, and built for this backend: for the CPU, with no other."""
        if self.build is None or not requirement.specifier.contains(self.build.version, prereleases=True):
            return False
        return backend in self.build.backends or (backend == "none" and not self.build.backends)


def probe_engine() -> InstalledEngine:
    """Ask `stepgguf doctor` about the engine that is installed now."""
    command = [sys.executable, "-m", "stepgguf", "doctor", "--json"]
    asked = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    try:
        report = json.loads(asked.stdout)
    except ValueError as error:
        last = asked.stderr.strip().rpartition("\n")[2]
        raise SetupError(f"the installed engine cannot be examined: {last}", hint="Run `stepgguf doctor`.") from error
    build = LlamaBuild.from_json(report["engine"]) if report["engine"] else None
    return InstalledEngine(build, next(Finding(**f) for f in report["findings"] if f["subject"] == "engine"))
