"""Where this program keeps what is its own, by the habits of the system (platformdirs); `stepgguf doctor` shows it.

                Linux                       macOS
    cache()     ~/.cache/stepgguf           ~/Library/Caches/stepgguf               can be made again, may be deleted
    data()      ~/.local/share/stepgguf     ~/Library/Application Support/stepgguf  cannot: what was said in chat

On Linux XDG_CACHE_HOME and XDG_DATA_HOME move them. A folder is made by whoever writes into it first.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import platformdirs

_NAME = "stepgguf"


def cache() -> Path:
    """The folder of what can be made again, and may be deleted."""
    return platformdirs.user_cache_path(_NAME, appauthor=False)


def measurements() -> Path:
    """The folder of what each type would lose in each tensor: a file for each source and imatrix that was measured."""
    return cache() / "errors"


def kernels() -> Path:
    """The folder of encoders and decoders, compiled for this machine's processor."""
    return cache() / "kernels"


def setup_log() -> Path:
    """The file with the whole output of the last build of the engine."""
    return cache() / "setup.log"


def data() -> Path:
    """The folder of what cannot be made again: sessions, and the history of what was typed."""
    return platformdirs.user_data_path(_NAME, appauthor=False)


def adopt_data(old: Path) -> None:
    """Move what an older version kept in another folder to data(), if there is nothing yet."""
    new = data()
    if old.is_dir() and not new.exists():
        with contextlib.suppress(OSError):  # then it stays where it is, and is not found
            new.parent.mkdir(parents=True, exist_ok=True)
            old.rename(new)


def sessions() -> Path:
    """The folder with a file for each conversation of `stepgguf chat`."""
    return data() / "sessions"


def agents() -> Path:
    """The folder with a folder of settings and sessions for each agent that `stepgguf launch` gives one."""
    return data() / "agents"


def history() -> Path:
    """The file of what was typed in `stepgguf chat`."""
    return data() / "history"
