"""What a llama-server of our own is started with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """How to start llama-server.

    binary: the program's name or path; None is `llama-server` as the shell finds it. n_ctx: tokens of each request;
    None, and gpu_layers < 0: llama-server fits them into the memory that is free. mtp: draft with the MTP blocks;
    mtp_file: where they are, if not in the model's file. rpc: host:port of machines that run llama.cpp's rpc-server and
    take a share of the weights.
    """

    binary: str | None = None
    n_ctx: int | None = None
    n_parallel: int = 1
    gpu_layers: int = -1
    threads: int | None = None
    mtp: bool = False
    mtp_file: Path | None = None
    rpc: Sequence[str] = ()

    def arguments(self) -> list[str]:
        """Return the options as llama-server spells them, without the model and the address."""
        arguments = ["--parallel", str(self.n_parallel), "--no-webui"]
        if self.n_ctx is not None:
            # A share for each request: in a common pool that runs full llama-server ends them all.
            arguments += ["--ctx-size", str(self.n_ctx * self.n_parallel)]
        if self.gpu_layers >= 0:
            arguments += ["--gpu-layers", str(self.gpu_layers)]
        if self.threads is not None:
            arguments += ["--threads", str(self.threads)]
        if self.mtp:
            arguments += ["--spec-type", "draft-mtp"]
            arguments += ["--model-draft", str(self.mtp_file)] if self.mtp_file else []
        if self.rpc:
            arguments += ["--rpc", ",".join(self.rpc)]
        return arguments
