"""The in-process engine: llama.cpp through llama-cpp-python's low-level API. The only `import llama_cpp`.

llama_cpp.Llama is not used: it reuses a common prefix of the last prompt without asking whether the sliding-window
cache still holds it, and with this model that silently corrupts every second turn. Here a prefix is kept only if
`llama_memory_seq_pos_min` says that the window before its end is still there; otherwise the prompt is read again.
"""

from __future__ import annotations

import ctypes
import functools
import os
import secrets
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import llama_cpp

from stepgguf.errors import BadMagic, ContextLengthExceeded, EngineError, ModelLoadFailed, UnsupportedModel
from stepgguf.runtime.engine import ModelInfo, Sampling, Step

BATCH = 512
ARCHITECTURE = "step35"
_LOG_ERROR = 4  # ggml_log_level


class LlamaEngine:
    """One model, one sequence. Not thread-safe."""

    def __init__(
        self,
        path: Path,
        *,
        n_ctx: int | None = None,
        gpu_layers: int = -1,
        threads: int | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> None:
        """Load a GGUF. n_ctx None: what the model was trained for, at most 32768. ModelLoadFailed says why not."""
        self._closed = True
        self._log = _log()
        self._log.install()
        _check_magic(path)
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = gpu_layers
        params.use_extra_bufts = not _has_amx()
        if progress is not None:
            report = progress

            def on_progress(share: float, _: ctypes.c_void_p) -> bool:
                report(share)
                return True

            params.progress_callback = self._progress = llama_cpp.llama_progress_callback(on_progress)
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise self._log.failure(f"{path} could not be loaded", gpu_layers)
        architecture = self._meta("general.architecture")
        if architecture != ARCHITECTURE:
            llama_cpp.llama_model_free(self._model)
            raise UnsupportedModel(
                f"{path}: general.architecture is {architecture!r}, expected {ARCHITECTURE!r}",
                hint="stepgguf runs Step-3.5 and Step-3.7 models only.",
            )
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        n_ctx_train = llama_cpp.llama_model_n_ctx_train(self._model)
        self._n_swa = llama_cpp.llama_model_n_swa(self._model)
        context = llama_cpp.llama_context_default_params()
        context.n_ctx = n_ctx or min(n_ctx_train, 32768)
        context.n_batch = context.n_ubatch = min(BATCH, context.n_ctx)
        context.n_seq_max = 1
        context.swa_full = False
        context.n_threads = context.n_threads_batch = threads or os.cpu_count() or 1
        self._context = llama_cpp.llama_init_from_model(self._model, context)
        if not self._context:
            llama_cpp.llama_model_free(self._model)
            raise self._log.failure(f"a context of {context.n_ctx} tokens could not be made", gpu_layers)
        self._closed = False
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._n_vocab = llama_cpp.llama_vocab_n_tokens(self._vocab)
        self._cached: list[int] = []  # the tokens whose state the context holds
        self._n_cached = 0
        self._info = ModelInfo(
            name=self._meta("general.name") or path.stem,
            chat_template=self._meta("tokenizer.chat_template"),
            sampling=self._sampling(),
            n_ctx=llama_cpp.llama_n_ctx(self._context),
            n_ctx_train=n_ctx_train,
        )

    @property
    def info(self) -> ModelInfo:
        return self._info

    @property
    def n_cached(self) -> int:
        return self._n_cached

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            llama_cpp.llama_free(self._context)
            llama_cpp.llama_model_free(self._model)

    def __enter__(self) -> LlamaEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # tokens -----------------------------------------------------------------------------------------------------

    def tokenize(self, text: str) -> list[int]:
        ids = self._tokenize(text, add_special=True)
        bos = llama_cpp.llama_vocab_bos(self._vocab)
        return ids[1:] if ids[:2] == [bos, bos] else ids

    def tokenize_piece(self, text: str) -> list[int]:
        return self._tokenize(text, add_special=False)

    def token_id(self, text: str) -> int | None:
        ids = self.tokenize_piece(text)
        return ids[0] if len(ids) == 1 else None

    def _tokenize(self, text: str, *, add_special: bool) -> list[int]:
        data = text.encode()
        room = len(data) + 2
        buffer = (llama_cpp.llama_token * room)()
        n = llama_cpp.llama_tokenize(self._vocab, data, len(data), buffer, room, add_special, True)
        assert 0 <= n <= room  # a token covers at least one byte
        return list(buffer[:n])

    def piece(self, token_id: int) -> bytes:
        """The bytes that a token stands for; special tokens are written out."""
        buffer = ctypes.create_string_buffer(256)
        n = llama_cpp.llama_token_to_piece(self._vocab, token_id, buffer, 256, 0, True)
        return buffer.raw[: max(0, n)]

    # generating -------------------------------------------------------------------------------------------------

    def generate(self, prompt: Sequence[int], sampling: Sampling, max_tokens: int | None = None) -> LlamaGeneration:
        n_ctx = self._info.n_ctx
        if len(prompt) >= n_ctx:
            raise ContextLengthExceeded(
                f"the prompt has {len(prompt)} tokens, the context {n_ctx}",
                hint=f"Start with a larger --ctx (the model knows up to {self._info.n_ctx_train}) or a new chat.",
            )
        room = n_ctx - len(prompt)
        return LlamaGeneration(self, list(prompt), sampling, min(room, max_tokens or room))

    def read(self, prompt: list[int]) -> None:
        """Bring the context to the state after the prompt, with logits for its last token."""
        keep = self._reusable(prompt)
        if keep == 0 or not llama_cpp.llama_memory_seq_rm(self._memory, 0, keep, -1):
            keep = 0
            llama_cpp.llama_memory_clear(self._memory, True)
        self._cached, self._n_cached = prompt[:keep], keep
        for start in range(keep, len(prompt), BATCH):
            self.decode(prompt[start : start + BATCH])

    def _reusable(self, prompt: list[int]) -> int:
        """How many leading tokens the context has and can go on from. The last one is always read, for its logits."""
        keep = 0
        for mine, theirs in zip(self._cached, prompt[:-1], strict=False):
            if mine != theirs:
                break
            keep += 1
        oldest = llama_cpp.llama_memory_seq_pos_min(self._memory, 0)
        return keep if 0 <= oldest <= max(0, keep - self._n_swa) else 0

    def decode(self, tokens: list[int]) -> None:
        """Append tokens to the sequence."""
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        code = llama_cpp.llama_decode(self._context, llama_cpp.llama_batch_get_one(array, len(tokens)))
        if code != 0:
            self._cached = []
            llama_cpp.llama_memory_clear(self._memory, True)
            raise EngineError(f"llama_decode failed with code {code}{self._log.tail()}", hint="Try a smaller --ctx.")
        self._cached += tokens

    def sample(self, chain: Any) -> int:
        return int(llama_cpp.llama_sampler_sample(chain, self._context, -1))

    def logits(self) -> list[float]:
        """The logits after the last decoded token, [n_vocab]."""
        return list(llama_cpp.llama_get_logits_ith(self._context, -1)[: self._n_vocab])

    def is_end(self, token_id: int) -> bool:
        return bool(llama_cpp.llama_vocab_is_eog(self._vocab, token_id))

    # metadata ---------------------------------------------------------------------------------------------------

    def _meta(self, key: str) -> str | None:
        name = key.encode()
        n = llama_cpp.llama_model_meta_val_str(self._model, name, None, 0)
        if n < 0:
            return None
        buffer = ctypes.create_string_buffer(n + 1)
        llama_cpp.llama_model_meta_val_str(self._model, name, buffer, n + 1)
        return buffer.value.decode("utf-8", errors="replace")

    def _sampling(self) -> Sampling:
        default = Sampling()
        values = {
            field: float(text) if (text := self._meta(f"general.sampling.{key}")) else getattr(default, field)
            for field, key in (("temperature", "temp"), ("top_k", "top_k"), ("top_p", "top_p"), ("min_p", "min_p"))
        }
        return Sampling(values["temperature"], int(values["top_k"]), values["top_p"], values["min_p"])


class LlamaGeneration:
    """Iterating reads the prompt and then makes one token a step."""

    def __init__(self, engine: LlamaEngine, prompt: list[int], sampling: Sampling, max_tokens: int) -> None:
        self._engine, self._prompt, self._sampling, self._max_tokens = engine, prompt, sampling, max_tokens
        self._forced: deque[int] = deque()
        self.finish_reason: str | None = None

    def force(self, token_ids: Sequence[int]) -> None:
        self._forced.extend(token_ids)

    def __iter__(self) -> Iterator[Step]:
        chain = _chain(self._sampling)
        try:
            self._engine.read(self._prompt)
            for n in range(self._max_tokens):
                forced = bool(self._forced)
                token = self._forced.popleft() if forced else self._engine.sample(chain)
                if not forced and self._engine.is_end(token):
                    self.finish_reason = "stop"
                    return
                yield Step(token, self._engine.piece(token), forced)
                if n + 1 < self._max_tokens:
                    self._engine.decode([token])
            self.finish_reason = "length"
        finally:
            llama_cpp.llama_sampler_free(chain)


def _chain(sampling: Sampling) -> Any:
    """llama.cpp's samplers in its own order: top_k, top_p, min_p, temperature, then a draw."""
    chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
    add = llama_cpp.llama_sampler_chain_add
    if sampling.temperature <= 0:
        add(chain, llama_cpp.llama_sampler_init_greedy())
        return chain
    if sampling.top_k > 0:
        add(chain, llama_cpp.llama_sampler_init_top_k(sampling.top_k))
    if sampling.top_p < 1:
        add(chain, llama_cpp.llama_sampler_init_top_p(sampling.top_p, 1))
    if sampling.min_p > 0:
        add(chain, llama_cpp.llama_sampler_init_min_p(sampling.min_p, 1))
    add(chain, llama_cpp.llama_sampler_init_temp(sampling.temperature))
    seed = secrets.randbits(32) if sampling.seed is None else sampling.seed & 0xFFFFFFFF
    add(chain, llama_cpp.llama_sampler_init_dist(seed))
    return chain


class _Log:
    """llama.cpp's messages: kept for error reports instead of printed. llama.cpp has one log for the process."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=20)
        self._level = 0
        self._callback = llama_cpp.llama_log_callback(self._on_message)

    def install(self) -> None:
        """Take the messages from whoever had them, and forget those of before."""
        self._lines.clear()
        llama_cpp.llama_log_set(self._callback, ctypes.c_void_p(0))

    def _on_message(self, level: int, text: bytes, _: ctypes.c_void_p) -> None:
        self._level = level if level < 5 else self._level  # 5 continues the line before
        if self._level >= _LOG_ERROR:
            self._lines.append(text.decode("utf-8", errors="replace").strip())

    def tail(self) -> str:
        lines = [line for line in self._lines if line]
        return f": {'; '.join(lines[-3:])}" if lines else ""

    def failure(self, message: str, gpu_layers: int) -> ModelLoadFailed:
        text = self.tail()
        memory = any(word in text.lower() for word in ("alloc", "out of memory", "oom"))
        hint = (
            f"There is not enough memory: try a smaller --ctx, fewer --gpu-layers (now {gpu_layers}) or a smaller type."
            if memory
            else "Check the file with `stepgguf verify`, and that llama-cpp-python is recent enough for step35."
        )
        return ModelLoadFailed(message + text, hint=hint)


def _has_amx() -> bool:
    """Whether the library uses AMX, which crashes it where GCC 12 compiled it.

    GCC 12's _tile_loadconfig tells the compiler of 8 of the 64 bytes that it reads (amxtileintrin.h), so ggml's tile
    configuration is optimized away and the first quantized matrix kills the process. Without ggml's "extra" buffer
    types weights stay as they are in the file and the AVX-512 code runs.
    """
    return b"AMX_INT8 = 1" in llama_cpp.llama_print_system_info()


@functools.cache
def _log() -> _Log:
    """The one log. llama.cpp keeps a pointer to its callback, so it must never go away."""
    return _Log()


def _check_magic(path: Path) -> None:
    """Names what llama.cpp would only hint at: no file, not a GGUF."""
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ModelLoadFailed(f"{path}: {error.strerror}", hint="Give a GGUF file.") from error
    if magic != b"GGUF":
        raise BadMagic(f"{path}: starts with {magic!r}, not b'GGUF'", hint="Give a file that `stepgguf convert` wrote.")
