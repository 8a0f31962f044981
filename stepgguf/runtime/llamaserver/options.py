"""What a llama-server of our own is started with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from stepgguf.runtime.placement import Attention, Placement


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """How to start llama-server.

    binary: the program's name or path; None is `llama-server` as the shell finds it. n_ctx: tokens of each request;
    None: llama-server fits them into the memory that is free, and so it does with what the placement leaves open.
    batch: tokens that it takes from all requests at a time, and ubatch those of one decode; None is its own number.
    mtp: draft with the MTP blocks; mtp_file: where they are, if not in the model's file. rpc: host:port of machines
    that run llama.cpp's rpc-server and take a share of the weights.
    """

    binary: str | None = None
    n_ctx: int | None = None
    n_parallel: int = 1
    placement: Placement = field(default_factory=Placement)
    attention: Attention = field(default_factory=Attention)
    batch: int | None = None
    ubatch: int | None = None
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
        arguments += [*self.placement.arguments(), *self.attention.arguments()]
        if self.batch is not None:
            arguments += ["--batch-size", str(self.batch)]
        if self.ubatch is not None:
            arguments += ["--ubatch-size", str(self.ubatch)]
        if self.threads is not None:
            arguments += ["--threads", str(self.threads)]
        if self.mtp:
            arguments += ["--spec-type", "draft-mtp"]
            arguments += ["--model-draft", str(self.mtp_file)] if self.mtp_file else []
        if self.rpc:
            arguments += ["--rpc", ",".join(self.rpc)]
        return arguments
