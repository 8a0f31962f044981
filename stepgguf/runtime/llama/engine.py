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
from stepgguf.runtime.engine import DEFAULT_CACHE_RAM, DEFAULT_CTX, FinishReason, ModelInfo, Request, Sink, Stats
from stepgguf.runtime.llama import hooks
from stepgguf.runtime.llama.context import Context
from stepgguf.runtime.llama.depth import DepthTuner
from stepgguf.runtime.llama.model import Model
from stepgguf.runtime.llama.mtp import Drafter
from stepgguf.runtime.llama.prefix import Prefixes
from stepgguf.runtime.llama.run import Run
from stepgguf.runtime.llama.scheduler import DecodeFailed, Scheduler
from stepgguf.runtime.llama.store import Store

BATCH = 512  # rows of a decode: what a cancel may have to wait for
MOST_RECOVERIES = 3  # within RECOVERY_SECONDS; after that something is wrong for good
RECOVERY_SECONDS = 600.0


class LlamaEngine:
    """A GGUF in llama.cpp, in this process."""

    def __init__(
        self,
        path: Path,
        *,
        n_ctx: int | None = None,
        n_parallel: int = 1,
        gpu_layers: int = -1,
        threads: int | None = None,
        draft: int | None = None,
        mtp_file: Path | None = None,
        mmap: bool = True,
        queue_limit: int = 64,
        cache_ram: int = DEFAULT_CACHE_RAM,
        cache_folder: Path | None = None,
        cache_disk: int = 32 * 2**30,
        progress: Callable[[float], None] | None = None,
    ) -> None:
        """Load a GGUF. ModelLoadFailed says why not.

        n_ctx: tokens that all requests share; None is what the model was trained for, at most DEFAULT_CTX. n_parallel:
        so many requests are decoded at once, queue_limit more wait. draft: MTP tokens to draft; None finds the best
        number, 0 is off. mtp_file: another GGUF that holds the MTP blocks, as `convert --mtp separate` writes it.
        cache_ram, cache_folder, cache_disk: bytes and place for conversations that are not in the context.
        """
        self._draft = draft
        mtp = draft != 0 and hooks.AVAILABLE
        inside = mtp and mtp_file is None
        self._model = Model(path, gpu_layers=gpu_layers, mtp=inside, mmap=mmap, progress=progress)
        self._heads = self._model  # whose MTP blocks draft
        self._n_ctx = n_ctx or min(self._model.n_ctx_train, DEFAULT_CTX)
        self._n_parallel, self._queue_limit = n_parallel, queue_limit
        self._threads = threads or os.cpu_count() or 1
        self._context: Context | None = None
        self._drafter: Drafter | None = None
        self._stats = Stats()
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._open: dict[Run, None] = {}  # every run that has not been told its end, in order
        self._stopping = False
        self._failures: list[float] = []
        try:
            if mtp and mtp_file is not None:
                self._heads = Model(mtp_file, gpu_layers=gpu_layers, mtp=True, mmap=mmap, progress=None)
                self._check_heads()
            self._store = Store(cache_ram, cache_folder, cache_disk, self._fingerprint(), self._model.n_embd)
            self._scheduler = self._start()
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

    # any thread -------------------------------------------------------------------------------------------------

    @property
    def info(self) -> ModelInfo:
        return self._info

    @property
    def n_heads(self) -> int:
        """MTP heads that draft; 0 if the file has none, they are switched off, or the library lacks the functions."""
        return self._drafter.n_heads if self._drafter else 0

    def set_draft(self, depth: int | None) -> None:
        """Draft so many tokens from the next step on; None: what is fastest. Without heads it changes nothing."""
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
        stats.n_context_used, stats.cache_bytes = self._scheduler.n_context_used, self._scheduler.cache_bytes
        return stats

    def submit(self, request: Request, sink: Sink) -> LlamaTicket:
        if len(request.prompt) >= self._info.n_ctx:
            raise ContextLengthExceeded(len(request.prompt), self._info.n_ctx, self._info.n_ctx_train)
        self._check_open()
        run = Run(self._model, request, sink, self._info.n_ctx)
        try:
            with self._lock:
                self._check_open()
                self._open[run] = None
                self._stats.n_requests += 1
                self._commands.put(lambda: self._scheduler.waiting.append(run))
        except EngineError:
            run.close()
            raise
        return LlamaTicket(self._commands, run)

    def _check_open(self) -> None:
        """Refuse before work is done for a request, and again when it takes its place."""
        if self._stopping or not self._stats.alive:
            raise EngineDied("the engine has stopped", recovered=False, hint="Start it again.")
        if len(self._open) >= self._n_parallel + self._queue_limit:
            raise self._stats.busy(self._n_parallel, self._queue_limit)

    def close(self) -> None:
        """End what runs, save what the disk cache should keep, free the model."""
        with self._lock:
            self._stopping = True
        self._commands.put(lambda: None)
        self._thread.join()
        self._free()
        self._close_models()

    # the engine's thread ----------------------------------------------------------------------------------------

    def _loop(self) -> None:
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
            self._fail(list(self._open), EngineDied("the engine was stopped", recovered=False))
        if self._context is not None:  # else it was lost, and with it what the sequences held
            self._scheduler.put_all_away()
        self._store.close()

    def _run_commands(self) -> None:
        """Carry out what callers left; with nothing to decode, wait for it."""
        idle = not self._scheduler.running and not self._scheduler.waiting
        while idle or not self._commands.empty():
            self._commands.get()()
            idle = False
        self._scheduler.drop_cancelled()

    def _ended(self, run: Run, reason: FinishReason) -> None:
        """The one place where a request is told its end."""
        with self._lock:
            del self._open[run]
        self._stats.add(run.finish(reason), failed=reason == "error")

    def _fail(self, runs: list[Run], error: EngineDied) -> None:
        for run in runs:
            run.error = error
            self._ended(run, "error")

    def _recover(self, cause: DecodeFailed) -> None:
        """The context is lost: tell who was in it, make a new one."""
        message = f"{cause}{self._model.log.tail()}"
        self._stats.n_recoveries += 1
        now = time.monotonic()
        self._failures = [*(t for t in self._failures if t > now - RECOVERY_SECONDS), now]
        again = len(self._failures) <= MOST_RECOVERIES
        hint = "A smaller --ctx or --parallel needs less memory."
        self._fail(self._scheduler.running, EngineDied(message, recovered=again, hint=hint))
        waiting = self._scheduler.waiting
        self._free()
        try:
            if again:
                self._scheduler = self._start()
                self._scheduler.waiting = waiting
        except EngineError:  # no memory for another context
            self._free()
        if self._context is None:
            self._stopping = True

    def _check_heads(self) -> None:
        model, heads = self._model, self._heads
        if not heads.n_heads:
            raise ModelLoadFailed(f"{heads.path} holds no MTP blocks", hint="Give what `--mtp separate` wrote.")
        found, expected = ((m.n_embd, m.n_vocab, m.n_swa) for m in (heads, model))
        if found != expected:
            raise ModelLoadFailed(
                f"{heads.path} is of another model than {model.path}: its width, vocabulary and window are "
                f"{found}, expected {expected}",
                hint="Give the MTP file that was written with this model.",
            )

    def _start(self) -> Scheduler:
        model, heads, n_seq = self._model, self._heads, self._n_parallel
        n_batch = min(BATCH, self._n_ctx)
        self._context = Context(
            model,
            n_ctx=self._n_ctx,
            n_seq=n_seq,
            n_batch=n_batch,
            n_outputs=n_seq * (1 + heads.n_heads),
            threads=self._threads,
            of=None,
        )
        if heads.n_heads:
            self._drafter = Drafter(heads, self._context, n_seq=n_seq, threads=self._threads)
        tuner = DepthTuner(heads.n_heads, self._draft) if self._drafter else None
        prefixes = Prefixes(self._context, self._drafter, model.n_swa)
        return Scheduler(prefixes, tuner, self._store, self._stats, self._ended)

    def _describe(self) -> ModelInfo:
        model = self._model
        assert self._context is not None
        return ModelInfo(
            name=model.metadata("general.name") or model.path.stem,
            chat_template=model.metadata("tokenizer.chat_template"),
            sampling=model.sampling(),
            n_ctx=self._context.n_ctx,
            n_ctx_train=model.n_ctx_train,
            n_vocab=model.n_vocab,
            engine=f"llama-cpp-python {llama_cpp.__version__}",
        )

    def _free(self) -> None:
        if self._drafter is not None:
            self._drafter.close()
        if self._context is not None:
            self._context.close()
        self._context = self._drafter = None

    def _close_models(self) -> None:
        self._model.close()
        self._heads.close()  # of one file both are the same, and the second time does nothing

    def _fingerprint(self) -> str:
        """What the bytes of a saved sequence depend on."""
        parts = [f"{llama_cpp.__version__} f16 {self._heads.n_heads}"]
        for path in dict.fromkeys((self._model.path, self._heads.path)):
            stat = path.stat()
            parts.append(f"{path.name} {stat.st_size} {stat.st_mtime_ns}")
        return " ".join(parts)


class LlamaTicket:
    def __init__(self, commands: queue.SimpleQueue[Callable[[], None]], run: Run) -> None:
        self._commands, self._run = commands, run

    def cancel(self) -> None:
        self._run.cancelled = True
        self._commands.put(lambda: None)

    def end_reasoning(self) -> None:
        self._commands.put(self._run.end_reasoning)
