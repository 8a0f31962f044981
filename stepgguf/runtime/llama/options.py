"""What the in-process engine is started with."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from stepgguf.files.byte_sizes import GIB
from stepgguf.runtime.engine import DEFAULT_CACHE_RAM
from stepgguf.runtime.placement import DEFAULT_UBATCH, Attention, Placement


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaOptions:
    """How to run a GGUF in this process.

    n_ctx: tokens that all requests share; None is what the model was trained for, at most DEFAULT_CTX. ubatch: tokens
    of a decode at most, of all requests together. llama.cpp could take more at a time (its n_batch) and cut them up
    itself, but then a cancel, and a state that is saved in the middle of a prompt, would have to wait for all of them.
    n_parallel: so many requests are decoded at once, queue_limit more wait. threads: None is one for each processor.
    draft: MTP tokens to draft; None finds the best number, 0 is off. mtp_file: another GGUF that holds the MTP blocks,
    as `convert --mtp separate` writes it. mmap False reads the file instead of mapping it. cache_ram, cache_folder,
    cache_disk: bytes and place for conversations that are not in the context.
    """

    n_ctx: int | None = None
    ubatch: int = DEFAULT_UBATCH
    n_parallel: int = 1
    placement: Placement = field(default_factory=Placement)
    attention: Attention = field(default_factory=Attention)
    threads: int | None = None
    draft: int | None = None
    mtp_file: Path | None = None
    mmap: bool = True
    queue_limit: int = 64
    cache_ram: int = DEFAULT_CACHE_RAM
    cache_folder: Path | None = None
    cache_disk: int = 32 * GIB
