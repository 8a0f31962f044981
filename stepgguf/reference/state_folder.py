"""A stream's folder: the hidden states before each layer, what was found in each, and of what model and text.

    stream.json      what the states are of: a folder of another model or another text is not gone on with
    states-007       what enters layer 7, float32 [rows, tokens, hidden], mapped: the system keeps in memory what fits
    found-007.npz    what observers found in layer 7
    scratch-*        of the layer that runs now

A file takes its name when it is whole and on the disk, and states-007 is removed when layer 7 is done (unless they are
kept for a pass backwards). So a stream goes on after its last whole layer.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stepgguf.files import disk

Floats = NDArray[np.float32]
Arrays = Mapping[str, NDArray[np.generic]]


class StateFolder:
    """See above. shape: of the hidden states. identity: of the model and the text."""

    def __init__(self, path: Path, shape: tuple[int, int, int], identity: Mapping[str, object]) -> None:
        self.path, self._shape = path, shape
        path.mkdir(parents=True, exist_ok=True)
        self._record, self._identity = path / "stream.json", json.dumps(identity, indent=1, sort_keys=True)
        if not self._record.exists() or self._record.read_text() != self._identity:
            self.restart()

    def restart(self) -> None:
        """Begin anew, whatever the folder holds."""
        self.clear()
        disk.replace(self._record, self._identity.encode())

    def clear(self) -> None:
        """Remove what is in the folder and belongs to a stream."""
        for pattern in ("stream.json", "states-*", "found-*", "scratch-*"):
            for file in self.path.glob(pattern):
                file.unlink()

    def last_states(self) -> int:
        """The last layer whose input is there; -1 if there is none."""
        return max(self._numbers(), default=-1)

    def first_states(self) -> int | None:
        """The first layer whose input is there; None if there is none."""
        return min(self._numbers(), default=None)

    @contextmanager
    def writing_states(self, layer: int) -> Iterator[Floats]:
        """A new file of what enters a layer, which takes its name when the block ends."""
        part = self.path / f"scratch-states-{layer:03d}"
        with part.open("w+b") as file:
            states = np.memmap(file, np.float32, "w+", shape=self._shape)
            yield states
            states.flush()
            os.fsync(file.fileno())
        part.replace(self._states(layer))
        disk.sync_folder(self.path)

    def states(self, layer: int) -> Floats:
        """What enters a layer, [rows, tokens, hidden]."""
        return np.memmap(self._states(layer), np.float32, "c", shape=self._shape)

    def drop_states(self, layer: int) -> None:
        """Remove what enters a layer, which has run."""
        self._states(layer).unlink(missing_ok=True)

    @contextmanager
    def scratch(self, name: str, shape: tuple[int, ...]) -> Iterator[Floats]:
        """Zeros that are needed for a while and may be larger than memory."""
        path = self.path / f"scratch-{name}"
        try:
            yield np.memmap(path, np.float32, "w+", shape=shape)
        finally:
            path.unlink(missing_ok=True)

    def write_found(self, stage: int | str, arrays: Arrays) -> None:
        """Keep what was found in a layer, or in the head."""
        with disk.replacing(self._found(stage)) as file:
            np.savez(file, allow_pickle=False, **arrays)

    def has_found(self, stage: int | str) -> bool:
        """Whether a layer, or the head, has run."""
        return self._found(stage).exists()

    def read_found(self, stage: int | str) -> dict[str, NDArray[np.generic]] | None:
        """What was found in a layer, or in the head; None if it has not run."""
        if not self.has_found(stage):
            return None
        with np.load(self._found(stage)) as file:
            return dict(file)

    def _numbers(self) -> list[int]:
        return [int(file.name.removeprefix("states-")) for file in self.path.glob("states-*[0-9]")]

    def _states(self, layer: int) -> Path:
        return self.path / f"states-{layer:03d}"

    def _found(self, stage: int | str) -> Path:
        return self.path / (f"found-{stage:03d}.npz" if isinstance(stage, int) else f"found-{stage}.npz")
