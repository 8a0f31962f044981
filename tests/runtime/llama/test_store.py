"""The disk cache of conversations: whatever becomes of its files, the engine starts and nothing wrong comes back."""

from __future__ import annotations

import io
import os
import pickle
import random
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stepgguf.errors import EngineError
from stepgguf.runtime.llama.mtp import DraftState
from stepgguf.runtime.llama.sequence_file import StoredSequence
from stepgguf.runtime.llama.sequences import SavedState
from stepgguf.runtime.llama.store import SequenceStore

pytestmark = pytest.mark.slow

TOKENS = np.arange(100, dtype=np.int32)
PROMPT = np.arange(101, dtype=np.int32)
N_EMBD, N_SWA = 8, 16


def draft() -> DraftState:
    return DraftState(100, bytearray(b"heads" * 9), np.linspace(0, 1, N_EMBD, dtype=np.float32))


def stored() -> StoredSequence:
    states = [SavedState(50, bytearray(b"window" * 7), draft()), SavedState(90, bytearray(b"w" * 9), None)]
    return StoredSequence(TOKENS, bytearray(b"cells" * 50), draft(), states, 84)


def store(folder: Path) -> SequenceStore:
    return SequenceStore(0, folder, 2**20, "a model", N_EMBD)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    store(tmp_path).put(stored())
    (path,) = tmp_path.rglob("*.npz")
    return path


def same(a: StoredSequence, b: StoredSequence) -> bool:
    def parts(e: StoredSequence) -> list[Any]:
        drafts = [
            d and (d.n_tokens, d.cells, d.hidden.tobytes()) for d in (e.draft, *(s.draft for s in e.saved_states))
        ]
        return [e.tokens.tobytes(), e.cells, e.oldest, [(s.n_tokens, s.sliding_window) for s in e.saved_states], drafts]

    return parts(a) == parts(b)


def test_a_sequence_comes_back_as_it_was(saved: Path, tmp_path: Path) -> None:
    loaded = store(tmp_path).take_best(PROMPT, N_SWA, 0)
    assert loaded is not None
    assert same(loaded, stored())
    assert saved.stat().st_mode & 0o777 == 0o600
    assert list(saved.parent.iterdir()) == [saved], "no temporary file is left"


def rewritten(path: Path, **changes: Any) -> None:
    """The file with other arrays; None leaves one out."""
    with np.load(path) as file:
        arrays: dict[str, Any] = {name: file[name] for name in file.files} | changes
    np.savez(path, allow_pickle=True, **{name: array for name, array in arrays.items() if array is not None})


def not_a_zip(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, TOKENS)


def compressed_otherwise(path: Path) -> None:
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        offset = file.start_dir
    data[offset + 10] = 99  # the method of the first member, which no zipfile knows
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "cut in half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "without its end": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "text": lambda path: path.write_text("not an archive"),
    "an array alone": not_a_zip,
    "a pickle": lambda path: path.write_bytes(pickle.dumps([1, 2])),
    "a pickle inside": lambda path: rewritten(path, cells=np.array([{"a": 1}], dtype=object)),
    "an unknown compression": compressed_otherwise,
    "tokens of another type": lambda path: rewritten(path, tokens=TOKENS.astype(np.float64)),
    "tokens of another shape": lambda path: rewritten(path, tokens=TOKENS.reshape(10, 10)),
    "other tokens": lambda path: rewritten(path, tokens=TOKENS + 1),
    "no tokens": lambda path: rewritten(path, tokens=None),
    "no cells": lambda path: rewritten(path, cells=None),
    "cells of another type": lambda path: rewritten(path, cells=np.zeros(5)),
    "a list for a number": lambda path: rewritten(path, oldest=np.arange(3)),
    "a number out of range": lambda path: rewritten(path, oldest=np.array(10**9)),
    "a negative number": lambda path: rewritten(path, **{"0": np.array(-1)}),
    "a window missing": lambda path: rewritten(path, **{"0.window": None}),
    "a saved state missing": lambda path: rewritten(path, **{"0": None}),
    "a hidden state of another model": lambda path: rewritten(path, **{"draft.hidden": np.zeros(7, np.float32)}),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_removed_with_a_line_and_never_used(
    saved: Path, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    DAMAGE[damage](saved)
    assert store(tmp_path).take_best(PROMPT, N_SWA, 0) is None
    assert not saved.exists()
    assert f"{saved} is damaged and was removed" in caplog.text
    again = store(tmp_path)
    again.put(stored())
    assert store(tmp_path).take_best(PROMPT, N_SWA, 0) is not None


def test_mutated_files_never_stop_it_and_never_give_another_sequence(saved: Path, tmp_path: Path) -> None:
    rng, good = random.Random(9), saved.read_bytes()
    n_refused = 0
    for _ in range(1500):
        data = bytearray(good)
        for _ in range(rng.choice((1, 1, 2, 8))):
            data[rng.randrange(len(data))] = rng.randrange(256)
        if rng.random() < 0.3:
            del data[rng.randrange(len(data)) :]
        saved.write_bytes(data)
        loaded = store(tmp_path).take_best(PROMPT, N_SWA, 0)
        n_refused += loaded is None
        assert loaded is None or same(loaded, stored())
    assert n_refused > 1000


def test_what_is_no_file_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store(tmp_path)
    (folder,) = tmp_path.iterdir()
    (folder / "folder.npz").mkdir()
    os.mkfifo(folder / "pipe.npz")
    (folder / "loop.npz").symlink_to("loop.npz")
    store(tmp_path).put(stored())
    assert caplog.text.count("cannot be read") >= 3
    assert store(tmp_path).take_best(PROMPT, N_SWA, 0) is not None


def test_what_a_killed_process_left_is_cleared_away_later(saved: Path, tmp_path: Path) -> None:
    old, new = saved.parent / "old.part", saved.parent / "new.part"
    for part in (old, new):
        part.touch()
    os.utime(old, (time.time() - 7200,) * 2)
    store(tmp_path)
    assert (old.exists(), new.exists()) == (False, True)


def test_files_that_somebody_deletes_meanwhile_are_forgotten(saved: Path, tmp_path: Path) -> None:
    running = store(tmp_path)
    saved.unlink()
    assert running.take_best(PROMPT, N_SWA, 0) is None
    other = stored()
    other.tokens = TOKENS + 7
    running.put(other)
    assert running.take_best(np.append(TOKENS + 7, 3).astype(np.int32), N_SWA, 0) is not None


def test_a_folder_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EngineError, match="conversations cannot be kept in"):
        store(tmp_path / "file")
