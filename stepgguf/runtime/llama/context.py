"""A llama_context over several sequences: decode rows, read logits, save and restore what a sequence holds.

A cell is the keys and values of one position, in all layers of a kind. One pool of n_ctx cells serves all sequences
(kv_unified), so that a long request can use what short ones leave. The layers with a sliding window keep only that
(swa_full off): 33 of the model's 45 layers then need 512 cells a sequence instead of n_ctx. Whoever goes back to an
earlier position must restore the sliding window first; see sequences.py.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from stepgguf.runtime.llama import mtp_api
from stepgguf.runtime.llama.model import LlamaModel
from stepgguf.runtime.placement import Attention, CacheType

Floats = npt.NDArray[np.float32]

NO_ROOM = 1  # llama_decode's code: not enough free cells; nothing has changed
DEFAULT_ATTENTION = Attention()
_CACHE_TYPES: dict[CacheType, int] = {  # ggml_type; llama-cpp-python does not name all of them
    "f32": 0, "f16": 1, "bf16": 30, "q8_0": 8, "q5_1": 7, "q5_0": 6, "q4_1": 3, "q4_0": 2, "iq4_nl": 20,
}  # fmt: skip
_FLASH_ATTENTION = {
    "auto": llama_cpp.LLAMA_FLASH_ATTN_TYPE_AUTO,
    "on": llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED,
    "off": llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED,
}
_SLIDING_WINDOW_ONLY = llama_cpp.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """Consecutive tokens of one sequence for a decode, from position `start` on.

    n_outputs: so many of the last rows get logits. hidden: for a context of the MTP blocks, the hidden state that goes
    in beside each token, [len(tokens), n_embd].
    """

    seq: int
    start: int
    tokens: Sequence[int]
    n_outputs: int
    hidden: Floats | None = None


class LlamaContext:
    """The keys and values of n_seq sequences, and the decodes that fill them. Not thread-safe."""

    def __init__(
        self,
        model: LlamaModel,
        *,
        n_ctx: int,
        n_seq: int,
        n_batch: int,
        n_outputs: int,
        threads: int,
        attention: Attention = DEFAULT_ATTENTION,
        drafts_for: LlamaContext | None = None,
    ) -> None:
        """Make a context with n_ctx cells. ModelLoadFailed if memory is short.

        n_batch: rows of a decode at most, n_outputs of them with logits. drafts_for: the context of the model whose
        tokens this one guesses; it then runs the model's MTP blocks.
        """
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max = n_ctx, n_seq
        params.n_batch = params.n_ubatch = n_batch
        params.n_outputs_max = n_outputs
        params.kv_unified, params.swa_full = True, False
        params.type_k, params.type_v = (_CACHE_TYPES[t] for t in (attention.cache_type_k, attention.cache_type_v))
        params.flash_attn_type = _FLASH_ATTENTION[attention.flash_attn]
        params.n_threads = params.n_threads_batch = threads
        if drafts_for is not None:
            params.ctx_type, params.ctx_other = llama_cpp.LLAMA_CONTEXT_TYPE_MTP, drafts_for.handle
        handle = llama_cpp.llama_init_from_model(model.handle, params)
        if not handle:
            raise model.load_error(f"a context of {n_ctx} tokens could not be made")
        self.handle: llama_cpp.llama_context_p = handle
        self._is_open = True
        self._memory = llama_cpp.llama_get_memory(handle)
        self._n_vocab, self._n_embd, self._drafts = model.n_vocab, model.n_embd, drafts_for is not None
        self.n_ctx = int(llama_cpp.llama_n_ctx(handle))
        self.n_batch, self.n_seq = n_batch, n_seq
        self._make_batch(n_batch)

    def close(self) -> None:
        if self._is_open:
            llama_cpp.llama_free(self.handle)
            self._is_open = False

    # decoding ---------------------------------------------------------------------------------------------------

    def _make_batch(self, n: int) -> None:
        """Make the arrays that llama_batch points to, once; a decode only writes values."""
        self._tokens, self._positions, self._seqs = (np.zeros(n, np.int32) for _ in range(3))
        self._outputs, self._ones = np.zeros(n, np.int8), np.ones(n, np.int32)
        # llama_batch allows a row several sequences, so it wants a pointer for each; ours all point to one number.
        self._seq_pointers = self._seqs.ctypes.data + 4 * np.arange(n, dtype=np.uintp)
        batch: Any = llama_cpp.llama_batch()  # its annotations say arrays, where C has pointers
        self._batch = batch
        int32, int8 = ctypes.POINTER(ctypes.c_int32), ctypes.POINTER(ctypes.c_int8)
        batch.token, batch.pos = self._tokens.ctypes.data_as(int32), self._positions.ctypes.data_as(int32)
        batch.n_seq_id = self._ones.ctypes.data_as(int32)
        batch.seq_id = self._seq_pointers.ctypes.data_as(ctypes.POINTER(int32))
        batch.logits = self._outputs.ctypes.data_as(int8)
        if self._drafts:
            self._hidden = np.zeros((n, self._n_embd), np.float32)
            batch.embd = self._hidden.ctypes.data_as(ctypes.POINTER(ctypes.c_float))

    def decode(self, rows: Sequence[DecodeRows]) -> int:
        """Run the model on all rows at once. Returns llama_decode's code: 0, NO_ROOM, or something fatal."""
        n = 0
        for part in rows:
            end = n + len(part.tokens)
            self._tokens[n:end] = part.tokens
            self._positions[n:end] = np.arange(part.start, part.start + len(part.tokens))
            self._seqs[n:end] = part.seq
            self._outputs[n:end] = 0
            self._outputs[end - part.n_outputs : end] = 1
            if part.hidden is not None:
                self._hidden[n:end] = part.hidden
            n = end
        assert 0 < n <= self.n_batch
        self._batch.n_tokens = n
        return int(llama_cpp.llama_decode(self.handle, self._batch))

    def logits(self, row: int) -> Floats:
        """Return the logits of a row of the last decode, [n_vocab]. They are a view: llama.cpp's samplers see what is
        written to it."""
        pointer = llama_cpp.llama_get_logits_ith(self.handle, row)
        return np.ctypeslib.as_array(pointer, (self._n_vocab,))

    def logits_of(self, row: int, n: int) -> Floats:
        """Return the logits of n rows of the last decode, from this one on, [n, n_vocab]. All of them must have some.
        They are a view, until the next decode."""
        pointer = llama_cpp.llama_get_logits_ith(self.handle, row)
        return np.ctypeslib.as_array(pointer, (n, self._n_vocab))

    def hidden_states(self, row: int, n: int) -> Floats:
        """Return the hidden states before the final norm of n rows from this one on, [n, n_embd]. They are a view,
        until the next decode."""
        pointer = mtp_api.hidden_state(self.handle, row)
        return np.ctypeslib.as_array(pointer, (n, self._n_embd))

    # memory -----------------------------------------------------------------------------------------------------

    def oldest_position(self, seq: int) -> int:
        """Return the first position that the sliding window still holds, with all after it. -1: the sequence is
        empty."""
        return int(llama_cpp.llama_memory_seq_pos_min(self._memory, seq))

    def newest_position(self, seq: int) -> int:
        """Return the last position of a sequence. -1: it is empty."""
        return int(llama_cpp.llama_memory_seq_pos_max(self._memory, seq))

    def remove(self, seq: int, start: int) -> None:
        """Forget the positions of a sequence from start on."""
        removed = llama_cpp.llama_memory_seq_rm(self._memory, seq, start, -1)
        assert removed  # it can refuse only for recurrent models

    def share(self, source: int, target: int, end: int) -> None:
        """Let the target sequence share the source's cells of the positions before end."""
        llama_cpp.llama_memory_seq_cp(self._memory, source, target, 0, end)

    def n_bytes(self, seq: int) -> int:
        """Return the size of what `save` would give, with all layers."""
        return int(llama_cpp.llama_state_seq_get_size_ext(self.handle, seq, 0))

    def save(self, seq: int, *, sliding_window_only: bool) -> bytearray:
        """Return a copy of the cells of a sequence: of all layers, or of those with a sliding window only."""
        flags = _SLIDING_WINDOW_ONLY if sliding_window_only else 0
        size = llama_cpp.llama_state_seq_get_size_ext(self.handle, seq, flags)
        buffer = bytearray(size)
        target = (ctypes.c_uint8 * size).from_buffer(buffer)
        n_saved = llama_cpp.llama_state_seq_get_data_ext(self.handle, target, size, seq, flags)
        assert n_saved == size
        return buffer

    def restore(self, seq: int, data: bytearray, *, sliding_window_only: bool) -> bool:
        """Replace the cells of a sequence by saved ones. False if there is no room for them."""
        flags = _SLIDING_WINDOW_ONLY if sliding_window_only else 0
        source = (ctypes.c_uint8 * len(data)).from_buffer(data)
        return bool(llama_cpp.llama_state_seq_set_data_ext(self.handle, source, len(data), seq, flags))
