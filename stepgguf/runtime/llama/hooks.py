"""llama.cpp's MTP functions, which llama-cpp-python binds as experimental: they may be absent in any release."""

from __future__ import annotations

from typing import Any

try:
    from llama_cpp import llama_cpp_ext as _ext
except (ImportError, AttributeError):  # a symbol has moved
    _ext = None  # type: ignore[assignment]

AVAILABLE = _ext is not None


def emit_hidden(handle: Any, *, outputs_only: bool) -> None:
    """Make a context keep the hidden state before its final norm: of each row, or of those with logits."""
    _ext.llama_set_embeddings_nextn(handle, True, outputs_only)


def hidden_row(handle: Any, row: int) -> Any:
    """Pointer to the hidden state of a row of the last decode."""
    return _ext.llama_get_embeddings_nextn_ith(handle, row)


def use_head(handle: Any, head: int) -> None:
    """Choose which MTP block the next decodes run."""
    _ext.llama_set_nextn_layer_offset(handle, head)
