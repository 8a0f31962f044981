"""The GGUF that somebody wants to run: what capacity.py and examine.py must know of it, read from its header alone."""

from __future__ import annotations

import glob
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stepgguf.fit.footprint import footprint_of, with_mtp_file
from stepgguf.fit.machine import network_filesystem
from stepgguf.fit.memory import Footprint
from stepgguf.runtime.engine import DEFAULT_CTX

if TYPE_CHECKING:
    from stepgguf.convert.sizes import Inventory

_SMALLER_TYPES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_K_S", "IQ4_XS", "Q3_K_M", "Q3_K_S", "Q2_K")  # large to small


@dataclass(frozen=True, slots=True)
class ModelFile:
    """What a GGUF says of itself; path is the first file of a split one.

    footprint: with the MTP blocks, wherever they are. template: the chat template, if there is one. network: the file
    system's type where the file comes over a network. mtp_file: the file that the MTP blocks are in, if that is
    another. command: the subcommand that runs it, for suggestions.
    """

    path: Path
    footprint: Footprint
    template: str | None
    network: str | None
    inventory: Inventory
    mtp_file: Path | None = None
    command: str = "chat"

    @property
    def sizes_by_type(self) -> Iterator[tuple[str, int]]:
        """(type, bytes) that the file would have as other stock types, large to small."""
        return ((name, self.inventory.sizes_as(name).total) for name in _SMALLER_TYPES)

    @property
    def default_ctx(self) -> int:
        """Tokens of context unless the user says how many: the model's own, at most DEFAULT_CTX."""
        return min(self.footprint.n_ctx_train, DEFAULT_CTX)

    def command_with(self, options: str) -> str:
        """The command line that runs this file with these options."""
        return f"stepgguf {self.command} {shlex.quote(str(self.path))} {options}"


def read_model_file(path: Path, mtp_file: Path | None = None, *, command: str = "chat") -> ModelFile:
    """Read the header of a file, or of all files of a split one. Raises the GGUFError that says what is wrong with it.

    mtp_file None: one whose name says that it belongs to this model is found beside it; see find_mtp_file.
    """
    from stepgguf.convert import sizes
    from stepgguf.convert.metadata import CHAT_TEMPLATE
    from stepgguf.convert.sources.gguf_file import GGUFSource

    with GGUFSource(path) as source:
        size, inventory = footprint_of(source), sizes.take_inventory(source)
        template = source.keys[CHAT_TEMPLATE].value if CHAT_TEMPLATE in source.keys else None
        first = source.headers[0].path
    # A file that has its own MTP blocks needs no other, whatever lies beside it.
    mtp_file = mtp_file or (None if size.has_mtp else find_mtp_file(path))
    if mtp_file is not None:
        with GGUFSource(mtp_file) as mtp_source:
            size = with_mtp_file(size, mtp_source)
    return ModelFile(
        path=first,
        footprint=size,
        template=template if isinstance(template, str) else None,
        network=network_filesystem(path),
        inventory=inventory,
        mtp_file=mtp_file,
        command=command,
    )


def find_mtp_file(path: Path) -> Path | None:
    """Find a model's MTP blocks where and as `convert --mtp separate` writes them: mtp-NAME, whole or split."""
    from stepgguf.convert.planner import mtp_path
    from stepgguf.convert.sources.splits import model_stem

    # Of a split model any file may be given: all of them share the stem that the MTP file's name is made of.
    whole = mtp_path(path.with_name(f"{model_stem(path)}.gguf"))
    splits = sorted(whole.parent.glob(f"{glob.escape(whole.stem)}-00001-of-*.gguf"))
    return next((file for file in (whole, *splits) if file.is_file()), None)
