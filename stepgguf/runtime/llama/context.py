"""A llama_context over several sequences: decode rows, read logits, save and restore what a sequence holds.

One pool of n_ctx cells serves all sequences (kv_unified), so that a long request can use what short ones leave. The
sliding-window layers keep only the window (swa_full off): 33 of the model's 45 layers then need 512 cells a sequence
instead of n_ctx. Whoever goes back to an earlier position must restore the window first; see prefix.py.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from stepgguf.runtime.llama import hooks
from stepgguf.runtime.llama.model import Model

Floats = npt.NDArray[np.float32]

NO_ROOM = 1  # llama_decode's code: not enough free cells; nothing has changed
_WINDOW_ONLY = llama_cpp.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY


@dataclass(frozen=True, slots=True)
class Rows:
    """Consecutive tokens of one sequence for a decode. `n_outputs`: so many of the last get logits.

    hidden: for a context of the MTP heads, what goes in beside each token, [len(tokens), n_embd].
    """

    seq: int
    start: int
    tokens: Sequence[int]
    n_outputs: int
    hidden: Floats | None = None


class Context:
    """`of`: the context that this one drafts for; it then runs the MTP heads. Not thread-safe."""

    def __init__(
        self, model: Model, *, n_ctx: int, n_seq: int, n_batch: int, n_outputs: int, threads: int, of: Context | None
    ) -> None:
        params: Any = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max = n_ctx, n_seq
        params.n_batch = params.n_ubatch = n_batch
        params.n_outputs_max = n_outputs
        params.kv_unified, params.swa_full = True, False
        params.n_threads = params.n_threads_batch = threads
        if of is not None:
            params.ctx_type, params.ctx_other = llama_cpp.LLAMA_CONTEXT_TYPE_MTP, of._handle
        self._handle: Any = llama_cpp.llama_init_from_model(model.handle, params)
        if not self._handle:
            raise model.failure(f"a context of {n_ctx} tokens could not be made")
        self._memory = llama_cpp.llama_get_memory(self._handle)
        self._n_vocab, self._n_embd, self._drafts = model.n_vocab, model.n_embd, of is not None
        self.n_ctx = int(llama_cpp.llama_n_ctx(self._handle))
        self.n_batch, self.n_seq = n_batch, n_seq
        self._make_batch(n_batch)

    def close(self) -> None:
        if self._handle:
            llama_cpp.llama_free(self._handle)
            self._handle = None

    @property
    def handle(self) -> Any:
        return self._handle

    # decoding ---------------------------------------------------------------------------------------------------

    def _make_batch(self, n: int) -> None:
        """The arrays that llama_batch points to, once; a decode only writes values."""
        self._tokens, self._positions, self._seqs = (np.zeros(n, np.int32) for _ in range(3))
        self._outputs, self._ones = np.zeros(n, np.int8), np.ones(n, np.int32)
        self._seq_pointers = self._seqs.ctypes.data + 4 * np.arange(n, dtype=np.uintp)
        batch: Any = llama_cpp.llama_batch()
        self._batch = batch
        int32, int8 = ctypes.POINTER(ctypes.c_int32), ctypes.POINTER(ctypes.c_int8)
        batch.token, batch.pos = self._tokens.ctypes.data_as(int32), self._positions.ctypes.data_as(int32)
        batch.n_seq_id = self._ones.ctypes.data_as(int32)
        batch.seq_id = self._seq_pointers.ctypes.data_as(ctypes.POINTER(int32))
        batch.logits = self._outputs.ctypes.data_as(int8)
        if self._drafts:
            self._hidden = np.zeros((n, self._n_embd), np.float32)
            batch.embd = self._hidden.ctypes.data_as(ctypes.POINTER(ctypes.c_float))

    def decode(self, rows: Sequence[Rows]) -> int:
        """Run the model on all rows at once. llama_decode's code: 0, NO_ROOM, or something fatal."""
        at = 0
        for part in rows:
            end = at + len(part.tokens)
            self._tokens[at:end] = part.tokens
            self._positions[at:end] = np.arange(part.start, part.start + len(part.tokens))
            self._seqs[at:end] = part.seq
            self._outputs[at:end] = 0
            self._outputs[end - part.n_outputs : end] = 1
            if part.hidden is not None:
                self._hidden[at:end] = part.hidden
            at = end
        assert 0 < at <= self.n_batch
        self._batch.n_tokens = at
        return int(llama_cpp.llama_decode(self._handle, self._batch))

    def logits(self, row: int) -> Floats:
        """[n_vocab] of a row of the last decode. A view: writing to it changes what llama.cpp's samplers see."""
        pointer = llama_cpp.llama_get_logits_ith(self._handle, row)
        return np.ctypeslib.as_array(pointer, (self._n_vocab,))

    def hidden(self, row: int, n: int) -> Floats:
        """[n, n_embd] before the final norm, from the row on. A view, until the next decode."""
        pointer = hooks.hidden_row(self._handle, row)
        return np.ctypeslib.as_array(pointer, (n, self._n_embd))

    # memory -----------------------------------------------------------------------------------------------------

    def oldest(self, seq: int) -> int:
        """The first position whose window cells are still there; every later one's are. -1: the sequence is empty."""
        return int(llama_cpp.llama_memory_seq_pos_min(self._memory, seq))

    def newest(self, seq: int) -> int:
        """The last position. -1: the sequence is empty."""
        return int(llama_cpp.llama_memory_seq_pos_max(self._memory, seq))

    def remove(self, seq: int, start: int) -> None:
        """Forget the positions from start on."""
        removed = llama_cpp.llama_memory_seq_rm(self._memory, seq, start, -1)
        assert removed  # it can refuse only for recurrent models

    def copy(self, source: int, target: int, end: int) -> None:
        """Let the target sequence share the positions before end."""
        llama_cpp.llama_memory_seq_cp(self._memory, source, target, 0, end)

    def size(self, seq: int) -> int:
        """Bytes of all cells of a sequence."""
        return int(llama_cpp.llama_state_seq_get_size_ext(self._handle, seq, 0))

    def save(self, seq: int, *, window_only: bool) -> bytearray:
        """The cells of a sequence, of the sliding-window layers only or of all."""
        flags = _WINDOW_ONLY if window_only else 0
        size = llama_cpp.llama_state_seq_get_size_ext(self._handle, seq, flags)
        buffer = bytearray(size)
        target = (ctypes.c_uint8 * size).from_buffer(buffer)
        n = llama_cpp.llama_state_seq_get_data_ext(self._handle, target, size, seq, flags)
        assert n == size
        return buffer

    def restore(self, seq: int, data: bytearray, *, window_only: bool) -> bool:
        """Replace the cells of a sequence by saved ones. False if there is no room for them."""
        flags = _WINDOW_ONLY if window_only else 0
        source = (ctypes.c_uint8 * len(data)).from_buffer(data)
        return bool(llama_cpp.llama_state_seq_set_data_ext(self._handle, source, len(data), seq, flags))
