"""llama.cpp's MTP functions, which llama-cpp-python binds as experimental: they may be absent in any release."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

try:
    from llama_cpp import llama_cpp_ext as _ext
except (ImportError, AttributeError):  # a symbol has moved
    _ext = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from llama_cpp import llama_context_p

AVAILABLE = _ext is not None


def keep_hidden_states(handle: llama_context_p, *, outputs_only: bool) -> None:
    """Make a context keep the hidden states before its final norm: of all rows, or of those with logits."""
    _ext.llama_set_embeddings_nextn(handle, True, outputs_only)


def hidden_state(handle: llama_context_p, row: int) -> ctypes.Array[ctypes.c_float]:
    """Return a pointer to the hidden state of a row of the last decode; those of the rows after it follow."""
    pointer: ctypes.Array[ctypes.c_float] = _ext.llama_get_embeddings_nextn_ith(handle, row)
    return pointer


def use_mtp_block(handle: llama_context_p, index: int) -> None:
    """Choose which MTP block the next decodes run, 0 the first."""
    _ext.llama_set_nextn_layer_offset(handle, index)
