"""What is read from the output of pip or uv while the engine is built.

pip   "  [27/193] /usr/bin/g++ -DGGML_BUILD ..."            a line of ninja's for each step that is done
uv    "DEBUG [27/193] /usr/bin/g++ -DGGML_BUILD ..."
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

_PREFIX = r"^(?:DEBUG)?\s*"
_STEP = re.compile(_PREFIX + r"\[(\d+)/(\d+)\] ")
_STAGES = (
    ("installing", re.compile(r"^Installing collected packages|^DEBUG Finished building: llama|^Prepared \d+ package")),
    ("configuring", re.compile(_PREFIX + r"\*\*\* Configuring CMake")),
    ("downloading", re.compile(r"^\s*Downloading |^DEBUG Downloading source distribution")),
)
# What compilers, linkers, CMake and uv say of a failure, but for what pip says of any build that fails.
_CAUSE = re.compile(r"\b(?:fatal )?error\s*: (?!subprocess-exited)|\bfatal\s*: |undefined reference|cannot find -l|"
                    r"No space left|^\s*cause: |Killed")  # fmt: skip
_CMAKE_ERROR = re.compile(_PREFIX + "CMake Error")
_CMAKE_ERROR_ENDS = re.compile(r"^(?:DEBUG)?\s*$|^\s*Call Stack")
_N_CAUSES = 12
_N_LAST = 8
_WIDTH = 300  # a line of ninja's may have thousands of characters


@dataclass(slots=True)
class BuildProgress:
    """How far a build is: its stage, and the steps of the compilation; n_steps is 0 until they are known."""

    stage: str = "preparing"
    n_done: int = 0
    n_steps: int = 0

    def read(self, line: str) -> None:
        """Take in the next line. A smaller build inside this one, as Vulkan's shader compiler is, does not count."""
        step = _STEP.match(line)
        if step is not None and int(step[2]) >= self.n_steps:
            self.stage, self.n_done, self.n_steps = "compiling", int(step[1]), int(step[2])
        elif step is None:
            self.stage = next((stage for stage, begins in _STAGES if begins.search(line)), self.stage)


def find_causes(lines: Iterable[str]) -> list[str]:
    """The lines of a failed build that say why: the first ones of compilers and of CMake, or else the last lines."""
    causes: list[str] = []
    last: deque[str] = deque(maxlen=_N_LAST)
    in_cmake_error = False
    for line in (line.rstrip() for line in lines):
        in_cmake_error = bool(_CMAKE_ERROR.match(line)) or (in_cmake_error and not _CMAKE_ERROR_ENDS.match(line))
        if in_cmake_error or _CAUSE.search(line):
            causes.append(line)
        if line.strip():
            last.append(line)
    shown = dict.fromkeys(re.sub(_PREFIX, "", line)[:_WIDTH] for line in causes or last)
    return list(shown)[:_N_CAUSES]
