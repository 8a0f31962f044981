"""LlamaEngine: one thread owns the contexts; callers leave commands and are told through their sinks.

If a decode fails for good, the requests it hit are told so and the contexts are made anew, with what the store kept.
If that fails too, or happens again and again, the engine is dead: every request ends with EngineDied.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import llama_cpp

from stepgguf.errors import ContextLengthExceeded, EngineDied, EngineError, ModelLoadFailed
from stepgguf.runtime.engine import DEFAULT_CTX, FinishReason, ModelInfo, Request, Sink, Stats
from stepgguf.runtime.llama import mtp_api
from stepgguf.runtime.llama.cache import SequenceCache
from stepgguf.runtime.llama.context import LlamaContext
from stepgguf.runtime.llama.depth import DepthTuner
from stepgguf.runtime.llama.model import LlamaModel
from stepgguf.runtime.llama.mtp import Drafter
from stepgguf.runtime.llama.options import LlamaOptions
from stepgguf.runtime.llama.request import ActiveRequest
from stepgguf.runtime.llama.scheduler import DecodeFailed, Scheduler
from stepgguf.runtime.llama.sequences import ContextSequences
from stepgguf.runtime.llama.store import SequenceStore

MOST_RECOVERIES = 3  # within RECOVERY_SECONDS; after that something is wrong for good
RECOVERY_SECONDS = 600.0


class LlamaEngine:
    """The engine protocol over a GGUF that llama.cpp runs in this process."""

    def __init__(self, path: Path, options: LlamaOptions, *, progress: Callable[[float], None] | None = None) -> None:
        """Load a GGUF. ModelLoadFailed says why not. progress is told the share that is loaded, 0 to 1."""
        self._options = options
        self._draft = options.draft  # kept for the next context, if this one is lost
        mtp = options.draft != 0 and mtp_api.AVAILABLE
        inside = mtp and options.mtp_file is None
        self._model = LlamaModel(path, options.placement, mtp=inside, mmap=options.mmap, progress=progress)
        self._mtp_model = self._model  # whose MTP blocks draft
        self._n_ctx = options.n_ctx or min(self._model.n_ctx_train, DEFAULT_CTX)
        self._threads = options.threads or os.cpu_count() or 1
        self._context: LlamaContext | None = None
        self._drafter: Drafter | None = None
        self._stats = Stats()
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._open: dict[ActiveRequest, None] = {}  # every request whose sink has not got Finished, in order
        self._stopping = False
        self._failure_times: list[float] = []
        try:
            if mtp and options.mtp_file is not None:
                self._mtp_model = LlamaModel(
                    options.mtp_file, options.placement, mtp=True, mmap=options.mmap, progress=None
                )
                self._check_mtp_file()
            self._store = SequenceStore(
                options.cache_ram, options.cache_folder, options.cache_disk, self._fingerprint(), self._model.n_embd
            )
            self._scheduler = self._make_scheduler()
        except BaseException:
            self._free()
            self._close_models()
            raise
        self._info = self._describe()
        self._thread = threading.Thread(target=self._loop, name="stepgguf-engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> LlamaEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # from any thread --------------------------------------------------------------------------------------------

    @property
    def info(self) -> ModelInfo:
        return self._info

    @property
    def n_mtp(self) -> int:
        """MTP blocks that draft; 0 if the file has none, they are switched off, or the library lacks the functions."""
        return self._drafter.n_mtp if self._drafter else 0

    def set_draft(self, depth: int | None) -> None:
        """Draft so many tokens from the next step on; None: what is fastest. Without MTP blocks it changes nothing."""
        self._draft = depth
        self._commands.put(lambda: self._scheduler.set_draft(depth))

    def tokenize(self, text: str) -> list[int]:
        return self._model.tokenize(text, add_special=True)

    def tokenize_piece(self, text: str) -> list[int]:
        return self._model.tokenize(text, add_special=False)

    def tokenize_plain(self, text: str) -> list[int]:
        return self._model.tokenize(text, add_special=False, parse_special=False)

    def token_id(self, text: str) -> int | None:
        ids = self.tokenize_piece(text)
        return ids[0] if len(ids) == 1 else None

    def piece(self, token_id: int) -> bytes:
        return self._model.piece(token_id)

    def stats(self) -> Stats:
        with self._lock:
            n_open = len(self._open)
        stats = replace(self._stats, drafted=list(self._stats.drafted), accepted=list(self._stats.accepted))
        stats.n_running = min(n_open, len(self._scheduler.running))
        stats.n_queued = n_open - stats.n_running
        cache = self._scheduler.cache
        stats.n_context_used, stats.cache_bytes = cache.n_context_used, cache.n_bytes
        return stats

    def submit(self, request: Request, sink: Sink) -> LlamaTicket:
        if len(request.prompt) >= self._info.n_ctx:
            raise ContextLengthExceeded(len(request.prompt), self._info.n_ctx, self._info.n_ctx_train)
        self._check_open()
        active = ActiveRequest(self._model, request, sink, self._info.n_ctx)
        try:
            with self._lock:
                self._check_open()
                self._open[active] = None
                self._stats.n_requests += 1
                self._commands.put(lambda: self._scheduler.waiting.append(active))
        except EngineError:
            active.close()
            raise
        return LlamaTicket(self._commands, active)

    def _check_open(self) -> None:
        """Refuse before work is done for a request, and again when it takes its place."""
        if self._stopping or not self._stats.alive:
            raise EngineDied("the engine has stopped", recovered=False, hint="Start it again.")
        n_parallel, queue_limit = self._options.n_parallel, self._options.queue_limit
        if len(self._open) >= n_parallel + queue_limit:
            raise self._stats.busy_error(n_parallel, queue_limit)

    def close(self) -> None:
        """End what runs, save what the disk cache should keep, free the model."""
        with self._lock:
            self._stopping = True
        self._commands.put(lambda: None)  # wakes the thread, if it waits for something to do
        self._thread.join()
        self._free()
        self._close_models()

    # from the engine's thread -----------------------------------------------------------------------------------

    def _loop(self) -> None:
        """Run the thread that owns the contexts: commands, then a step, until it is stopped."""
        try:
            while not self._stopping:
                self._run_commands()
                try:
                    self._scheduler.step()
                except DecodeFailed as error:
                    self._recover(error)
        finally:  # also after a bug of ours: nobody may wait for ever
            self._stats.alive = False
            with self._lock:
                self._stopping = True
            self._fail_requests(list(self._open), EngineDied("the engine was stopped", recovered=False))
        if self._context is not None:  # else it was lost, and with it what the sequences held
            self._scheduler.cache.put_all_away()
        self._store.close()

    def _run_commands(self) -> None:
        """Carry out what callers left; with nothing to decode, wait for it."""
        idle = not self._scheduler.running and not self._scheduler.waiting
        while idle or not self._commands.empty():
            self._commands.get()()
            idle = False
        self._scheduler.drop_cancelled()

    def _end_request(self, request: ActiveRequest, reason: FinishReason) -> None:
        """Give a request's sink Finished. This is the one place that does."""
        with self._lock:
            del self._open[request]
        self._stats.add(request.finish(reason), failed=reason == "error")

    def _fail_requests(self, requests: list[ActiveRequest], error: EngineDied) -> None:
        for request in requests:
            request.error = error
            self._end_request(request, "error")

    def _recover(self, cause: DecodeFailed) -> None:
        """End the requests that were in a lost context, and make a new one for those that wait.

        If that cannot be had, or it happened too often, the loop stops, which ends the others too.
        """
        message = f"{cause}{self._model.log.last_errors()}"
        self._stats.n_recoveries += 1
        now = time.monotonic()
        self._failure_times = [*(t for t in self._failure_times if t > now - RECOVERY_SECONDS), now]
        again = len(self._failure_times) <= MOST_RECOVERIES
        hint = "A smaller --ctx or --parallel needs less memory."
        self._fail_requests(self._scheduler.running, EngineDied(message, recovered=again, hint=hint))
        waiting = self._scheduler.waiting
        self._free()
        try:
            if again:
                self._scheduler = self._make_scheduler()
                self._scheduler.waiting = waiting
        except EngineError:  # no memory for another context
            self._free()
        if self._context is None:
            self._stopping = True

    def _check_mtp_file(self) -> None:
        """Raise ModelLoadFailed if the file of the MTP blocks does not go with the model's."""
        model, mtp_model = self._model, self._mtp_model
        if not mtp_model.n_mtp:
            raise ModelLoadFailed(f"{mtp_model.path} holds no MTP blocks", hint="Give what `--mtp separate` wrote.")
        found, expected = ((m.n_embd, m.n_vocab, m.n_swa) for m in (mtp_model, model))
        if found != expected:
            raise ModelLoadFailed(
                f"{mtp_model.path} is of another model than {model.path}: its width, vocabulary and window are "
                f"{found}, expected {expected}",
                hint="Give the MTP file that was written with this model.",
            )

    def _make_scheduler(self) -> Scheduler:
        """Make a new context, with nothing in it, and what goes with it. ModelLoadFailed if memory is short."""
        model, mtp_model, n_seq = self._model, self._mtp_model, self._options.n_parallel
        n_batch = min(self._options.ubatch, self._n_ctx)
        self._context = LlamaContext(
            model,
            n_ctx=self._n_ctx,
            n_seq=n_seq,
            n_batch=n_batch,
            n_outputs=n_seq * (1 + mtp_model.n_mtp),
            threads=self._threads,
            attention=self._options.attention,
        )
        if mtp_model.n_mtp:
            self._drafter = Drafter(
                mtp_model, self._context, n_seq=n_seq, threads=self._threads, attention=self._options.attention
            )
        tuner = DepthTuner(mtp_model.n_mtp, self._draft) if self._drafter else None
        sequences = ContextSequences(self._context, self._drafter, model.n_swa)
        return Scheduler(SequenceCache(sequences, self._store), tuner, self._stats, self._end_request)

    def _describe(self) -> ModelInfo:
        model = self._model
        assert self._context is not None
        return ModelInfo(
            name=model.metadata("general.name") or model.path.stem,
            chat_template=model.metadata("tokenizer.chat_template"),
            sampling=model.recommended_sampling(),
            n_ctx=self._context.n_ctx,
            n_ctx_train=model.n_ctx_train,
            n_vocab=model.n_vocab,
            engine=f"llama-cpp-python {llama_cpp.__version__}",
        )

    def _free(self) -> None:
        """Let go of the context, and of the MTP blocks' first: it refers to the other."""
        if self._drafter is not None:
            self._drafter.close()
        if self._context is not None:
            self._context.close()
        self._context = self._drafter = None

    def _close_models(self) -> None:
        self._model.close()
        self._mtp_model.close()  # of one file both are the same, and the second time does nothing

    def _fingerprint(self) -> str:
        """Return what the bytes of a saved sequence depend on."""
        attention = self._options.attention  # without flash attention values are stored transposed
        cells = f"{attention.cache_type_k} {attention.cache_type_v} {attention.flash_attn}"
        parts = [f"{llama_cpp.__version__} {cells} {self._mtp_model.n_mtp}"]
        for path in dict.fromkeys((self._model.path, self._mtp_model.path)):
            stat = path.stat()
            parts.append(f"{path.name} {stat.st_size} {stat.st_mtime_ns}")
        return " ".join(parts)


class LlamaTicket:
    """The engine protocol's Ticket: both methods leave a command for the engine's thread."""

    def __init__(self, commands: queue.SimpleQueue[Callable[[], None]], request: ActiveRequest) -> None:
        self._commands, self._request = commands, request

    def cancel(self) -> None:
        self._request.cancelled = True
        self._commands.put(lambda: None)  # wakes the thread, if it waits for something to do

    def end_reasoning(self) -> None:
        self._commands.put(self._request.end_reasoning)
