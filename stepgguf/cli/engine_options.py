"""The options of chat, serve and bench that say how a model is run; those of memory are in memory_options.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from stepgguf.cli import arguments
from stepgguf.files.byte_sizes import size_word
from stepgguf.runtime.engine import DEFAULT_CACHE_RAM
from stepgguf.runtime.placement import Attention, Placement

IN_PROCESS = "llama-cpp-python"
LLAMA_SERVER = "llama-server"

Draft = Annotated[
    int | None,
    typer.Option(
        min=0, help="MTP tokens to draft a step; 0 is off. Default: whatever is fastest, measured as it runs."
    ),
]
Mmap = Annotated[
    bool | None,
    typer.Option(
        "--mmap/--no-mmap",
        show_default="mapped; read on a DGX Spark",
        help="Map the file into memory, or read it: ten times faster to load on a DGX Spark.",
    ),
]
MtpFile = Annotated[
    Path | None,
    typer.Option(
        metavar="MTP.gguf",
        help="The file with the MTP blocks, where `--mtp separate` put them. Default: mtp-FILE.gguf beside the model.",
    ),
]
Force = Annotated[
    bool, typer.Option("--force", help="Load the model even if it does not fit the memory or the context.")
]
CacheRam = Annotated[
    int,
    typer.Option(
        parser=arguments.parse_size,
        metavar="SIZE",
        show_default=size_word(DEFAULT_CACHE_RAM),
        help="Memory for conversations that have left the context, and for saved states to go back to.",
    ),
]
CacheFolder = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="Keep conversations there too; they outlive a restart.")
]
EngineName = Annotated[
    str,
    typer.Option(
        "--engine",
        metavar=f"{IN_PROCESS}|{LLAMA_SERVER}[=PATH|=URL]",
        help="What runs the model: this process, or llama-server, which is started, or used at its URL.",
    ),
]
Rpc = Annotated[
    list[str] | None,
    typer.Option(metavar="HOST:PORT", help="With llama-server: a machine whose rpc-server takes a share of the model."),
]


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What the options above and those of memory_options.py were set to.

    ctx: LONGEST is the longest that fits. trained: refuse one that is longer than the model was trained for.
    """

    ctx: int | None = None
    placement: Placement = field(default_factory=Placement)
    attention: Attention = field(default_factory=Attention)
    batch: int | None = None
    ubatch: int | None = None
    parallel: int = 1
    queue: int = 64
    threads: int | None = None
    draft: int | None = None
    mmap: bool | None = None
    cache_ram: int = DEFAULT_CACHE_RAM
    cache_folder: Path | None = None
    engine: str = IN_PROCESS
    rpc: tuple[str, ...] = ()
    api_key: str | None = None  # of a llama-server at a URL
    mtp_file: Path | None = None
    force: bool = False
    trained: bool = True

    @property
    def engine_name(self) -> str:
        """IN_PROCESS or LLAMA_SERVER, or a word that _check_options refuses."""
        return self.engine.partition("=")[0]

    @property
    def server_binary(self) -> str:
        """Where llama-server is; empty for the one on the PATH."""
        return "" if self.server_url else self.engine.partition("=")[2]

    @property
    def server_url(self) -> str:
        """The URL of a llama-server that runs already; empty if there is none."""
        where = self.engine.partition("=")[2]
        return where if "://" in where else ""

    @property
    def has_memory_options(self) -> bool:
        """Whether any of memory_options.py is set, --ctx aside."""
        chosen = (self.placement, self.attention, self.batch, self.ubatch)
        return chosen != (Placement(), Attention(), None, None)
