"""Sizes of files and memory as text: for a sentence, and as one word for the command line and for a file's name."""

from __future__ import annotations

KIB, MIB, GIB = 2**10, 2**20, 2**30


def readable_size(n_bytes: float) -> str:
    """The size in the largest binary unit that it fills, for a sentence: "103.8 GiB", "1.63 GiB", "17 B"."""
    for unit, scale in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if n_bytes >= scale:
            return f"{n_bytes / scale:.1f} {unit}" if n_bytes >= 10 * scale else f"{n_bytes / scale:.2f} {unit}"
    return f"{n_bytes:.0f} B"


def size_word(n_bytes: float) -> str:
    """The size with four digits and without a space, as options such as --fit take it: "103.8GiB", "512MiB"."""
    return f"{n_bytes / GIB:.4g}GiB" if n_bytes >= GIB else f"{n_bytes / MIB:.4g}MiB"
