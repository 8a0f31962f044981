"""LlamaServerEngine: takes requests, lets as many run as llama-server has slots, one thread each."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from stepgguf.errors import ContextLengthExceeded, EngineDied, EngineError, StepggufError
from stepgguf.runtime.engine import FinishReason, ModelInfo, Queued, Request, Sampling, Sink, Stats
from stepgguf.runtime.http_events import ConnectionLost
from stepgguf.runtime.llamaserver.client import Json, LlamaServerClient
from stepgguf.runtime.llamaserver.gbnf import check_rules
from stepgguf.runtime.llamaserver.options import ServerOptions
from stepgguf.runtime.llamaserver.process import ForeignServer, LlamaProcess, LlamaServer
from stepgguf.runtime.llamaserver.request import RemoteRequest, ServerHandle
from stepgguf.runtime.llamaserver.vocabulary import ServerVocabulary

Argument = TypeVar("Argument")
Answer = TypeVar("Answer")

# llama.cpp's own values, shown where the file recommends none (common.h, common_params_sampling)
_LLAMA_DEFAULTS = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05}
_PATIENCE_SECONDS = 60.0  # for a server that starts again
_STOP_SECONDS = 10.0


class LlamaServerEngine:
    """The engine protocol over a llama-server. Make it with `spawn` or `attach`."""

    def __init__(self, server: LlamaServer, client: LlamaServerClient, *, name: str | None, queue_limit: int) -> None:
        """Ask a server that is ready what it runs. `name` is what the model is called, None: as its file.

        queue_limit: so many requests wait beside those that run; more are refused.
        """
        self._server, self._client, self._queue_limit = server, client, queue_limit
        props, meta = client.get("/props"), client.get("/v1/models")["data"][0]["meta"]
        settings = props["default_generation_settings"]
        self._info = ModelInfo(
            name=name or Path(props["model_path"]).stem,
            chat_template=props["chat_template"] or None,
            sampling=_recommended_sampling(settings["params"]),
            n_ctx=settings["n_ctx"],
            n_ctx_train=meta["n_ctx_train"],
            n_vocab=meta["n_vocab"],
            engine=f"llama-server {props['build_info']}",
        )
        self._vocabulary = ServerVocabulary(client)
        self._n_parallel: int = props["total_slots"]
        speculates = False
        with contextlib.suppress(EngineError):  # a server without /slots
            speculates = any(slot["speculative"] for slot in client.get("/slots"))
        self._handle = ServerHandle(server, client, self._vocabulary, self._info.n_ctx, self._n_parallel, speculates)
        self._changed = threading.Condition()
        self._waiting: list[RemoteRequest] = []
        self._running: list[RemoteRequest] = []
        self._stats = Stats()
        self._closed = False

    @classmethod
    def spawn(
        cls, model: Path, options: ServerOptions, *, queue_limit: int, progress: Callable[[float], None] | None = None
    ) -> LlamaServerEngine:
        """Start llama-server for a GGUF and wait until it is loaded. ModelLoadFailed has its last lines.

        progress is told 0 and 1: llama-server does not say how far it is.
        """
        if progress is not None:
            progress(0.0)
        process = LlamaProcess(model, options)
        with contextlib.ExitStack() as undo:
            undo.callback(process.close)
            if progress is not None:
                progress(1.0)
            try:
                engine = cls(process, process.client, name=model.stem, queue_limit=queue_limit)
            except ConnectionLost:
                raise process.lost_connection_error() from None
            undo.pop_all()
        return engine

    @classmethod
    def attach(cls, url: str, *, api_key: str | None, model: Path | None, queue_limit: int) -> LlamaServerEngine:
        """Use a llama-server that runs already. `model` only names it. EngineError if it does not answer."""
        client = LlamaServerClient(url, api_key)
        try:
            return cls(ForeignServer(client), client, name=model.stem if model else None, queue_limit=queue_limit)
        except ConnectionLost as error:
            raise EngineError(
                f"no llama-server answers: {client.url}: {error}", hint="Start it, or check the address."
            ) from error

    @property
    def info(self) -> ModelInfo:
        return self._info

    # tokens -----------------------------------------------------------------------------------------------------

    def tokenize(self, text: str) -> list[int]:
        return self._ask(self._vocabulary.tokenize, text)

    def tokenize_piece(self, text: str) -> list[int]:
        return self._ask(self._vocabulary.tokenize_piece, text)

    def tokenize_plain(self, text: str) -> list[int]:
        return self._ask(self._vocabulary.tokenize_plain, text)

    def token_id(self, text: str) -> int | None:
        ids = self.tokenize_piece(text)
        return ids[0] if len(ids) == 1 else None

    def piece(self, token_id: int) -> bytes:
        return self._ask(self._vocabulary.piece, token_id)

    def _ask(self, question: Callable[[Argument], Answer], argument: Argument) -> Answer:
        self._server.wait_until_ready(_PATIENCE_SECONDS)
        try:
            return question(argument)
        except ConnectionLost:
            raise self._server.lost_connection_error() from None

    # requests ---------------------------------------------------------------------------------------------------

    def submit(self, request: Request, sink: Sink) -> LlamaServerTicket:
        n_prompt, n_ctx = len(request.prompt), self._info.n_ctx
        if n_prompt >= n_ctx:
            raise ContextLengthExceeded(n_prompt, n_ctx, self._info.n_ctx_train)
        if request.grammar is not None:
            check_rules(request.grammar)
        active = RemoteRequest(self._handle, request, sink)
        with self._changed:
            if self._closed or not self._server.alive:
                raise EngineDied("llama-server has stopped", recovered=False, hint="Start it again.")
            if len(self._waiting) + len(self._running) >= self._n_parallel + self._queue_limit:
                raise self._stats.busy_error(self._n_parallel, self._queue_limit)
            self._stats.n_requests += 1
            self._waiting.append(active)
        threading.Thread(target=self._serve, args=(active,), name="llama-server request", daemon=True).start()
        return LlamaServerTicket(active, self._changed)

    def stats(self) -> Stats:
        with self._changed:
            return replace(
                self._stats,
                drafted=list(self._stats.drafted),
                accepted=list(self._stats.accepted),
                n_running=len(self._running),
                n_queued=len(self._waiting),
                n_recoveries=self._server.n_recoveries,
                alive=self._server.alive and not self._closed,
            )

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._server.close()
        with self._changed:
            for active in self._running:
                active.interrupt()
            self._changed.wait_for(lambda: not self._running and not self._waiting, _STOP_SECONDS)

    def _serve(self, active: RemoteRequest) -> None:
        """The thread of a request: it ends with one Finished, whatever happens."""
        reason: FinishReason = "error"
        error: StepggufError | None = None
        try:
            self._await_turn(active)
            reason = active.serve()
        except StepggufError as caught:
            error = caught
        except (LookupError, TypeError, ValueError) as caught:
            error = EngineError(f"llama-server answers what we do not know: {caught!r}", hint="Is it very old or new?")
        last = active.finished_event(reason, error)
        with self._changed:
            (self._running if active in self._running else self._waiting).remove(active)
            self._stats.add(last.timings, failed=last.reason == "error")
            self._stats.n_steps += last.timings.n_steps
            self._changed.notify_all()
        active.emit(last)  # after its place is free: who hears of the end may submit again at once

    def _await_turn(self, active: RemoteRequest) -> None:
        """First come, first served. EngineDied if the engine is closed meanwhile."""
        n_ahead_emitted = None
        with self._changed:
            while not active.cancelled and (self._waiting[0] is not active or len(self._running) >= self._n_parallel):
                if self._closed:
                    raise EngineDied("the engine was stopped", recovered=False)
                if n_ahead_emitted != (n_ahead := self._waiting.index(active)):
                    active.emit(Queued(n_ahead))
                    n_ahead_emitted = n_ahead
                self._changed.wait()
            self._waiting.remove(active)
            self._running.append(active)
            self._changed.notify_all()


class LlamaServerTicket:
    """The engine protocol's Ticket. `changed` wakes the threads that wait for their turn."""

    def __init__(self, active: RemoteRequest, changed: threading.Condition) -> None:
        self._active, self._changed = active, changed

    def cancel(self) -> None:
        self._active.cancel()
        with self._changed:  # it may be waiting for its turn
            self._changed.notify_all()

    def end_reasoning(self) -> None:
        self._active.end_reasoning()


def _recommended_sampling(params: Json) -> Sampling:
    """What the file recommends; llama-server shows its own values, in float32, where it recommends nothing."""
    chosen = {
        name: round(params[name], 6) for name, llama in _LLAMA_DEFAULTS.items() if round(params[name], 6) != llama
    }
    return replace(Sampling(), **chosen)
