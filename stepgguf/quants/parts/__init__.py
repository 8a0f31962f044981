"""Blocks taken apart into factors, scales, minimums and codes, and packed again, byte for byte. numpy only."""

from stepgguf.quants.parts.blocks import Parts, empty_parts, pack, take_apart
from stepgguf.quants.parts.layout import TABLE, Layout

__all__ = ["TABLE", "Layout", "Parts", "empty_parts", "pack", "take_apart"]
