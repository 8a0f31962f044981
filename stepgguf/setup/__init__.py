"""Installing what running a model needs, built for this machine's GPU.

tools.py          what a build needs of the machine, found or missing with the command that gets it
requirements.py   what this package's `run` extra asks for, and what of it is not installed
installer.py      pip or uv, and their command lines for this environment
plan.py           machine, tools, installed packages -> the commands to run
run.py            runs one, with its whole output in a log
output.py         what is read from that output: how far the build is, and why it failed
engine.py         what the installed engine is, asked in a process of its own

pip keeps the wheels that it has built, and CMAKE_ARGS is not in the key: what was once built for the CPU would be
installed again when a GPU is asked for. Here the engine is always built from its source, and nothing kept is taken.

The choice that the command line offers is here, where reading it loads nothing else.
"""

from typing import Literal, TypeAlias

GpuChoice: TypeAlias = Literal["auto", "cuda", "metal", "vulkan", "hip", "none"]  # what runs models; none is the CPU
