"""A session's ChatBackend over a running server: streamed Chat Completions.

    POST /v1/chat/completions   data: {"choices": [{"delta": {...}, "finish_reason": null}]}  ...  data: [DONE]

A thread reads the socket and leaves what it read in a queue, so the terminal stays awake; a cancel shuts the socket,
which servers take as a cancel. The server counts tokens at the end, until then a delta counts as one. Speeds are
measured here and include the way.
"""

from __future__ import annotations

import json
import queue
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from stepgguf.chat.messages import ChatMessage
from stepgguf.chat.output import Delta
from stepgguf.conversation.records import AnswerOrigin, AnswerUsage, ChatSettings
from stepgguf.conversation.session import Progress
from stepgguf.errors import EngineBusy, EngineError, RequestError, StepggufError
from stepgguf.files import jsonread
from stepgguf.files.jsonread import Value
from stepgguf.runtime.engine import Sampling
from stepgguf.runtime.http_events import ConnectionLost, HttpExchange, ServerAddress, bearer_header

_CONNECT_SECONDS = 10.0
_MOST_ERROR = 2**16  # bytes of an error's body that are read
_MOST_ANSWER = 2**24  # and of other documents
_NO_TLS = "Does the server speak TLS, with a certificate that this machine trusts? If not, write http://."
_OTHER_SERVER = "Is it a server of Chat Completions, and is the port right?"


class RemoteBackend:
    """Answers with a server of Chat Completions. EngineError: there is none at this address."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        try:
            address = ServerAddress.parse(url if "//" in url else f"http://{url}")
        except ValueError:
            raise EngineError(
                f"{url}: not a server's address", hint="Write for example http://127.0.0.1:8080."
            ) from None
        # The base URLs of OpenAI's clients end in /v1; the address that `stepgguf serve` prints does not.
        self._address = replace(address, path=address.path.removesuffix("/v1"))
        self._url = self._address.url
        self._headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
        if api_key:
            self._headers |= bearer_header(api_key)
        listed = self._ask_document("/v1/models").get("data")
        models = listed.array() if listed is not None else []
        if not models:
            raise EngineError(f"{self._url}/v1/models lists no model", hint=_OTHER_SERVER)
        self._model = models[0]["id"].text()
        self.origin = AnswerOrigin(self._model, self._url)
        n_ctx = models[0].get("context_length")
        self.n_ctx = n_ctx.integer(1) if n_ctx is not None else None
        self.default_sampling: Sampling | None = None

    def count_tokens(self, text: str) -> int | None:
        try:
            return self._ask_document("/tokenize", {"text": text})["count"].integer()
        except StepggufError:
            return None

    def start_answer(self, messages: Sequence[ChatMessage], settings: ChatSettings) -> RemoteGeneration:
        body: dict[str, object] = {
            "model": self._model,
            "messages": [*messages],
            "stream": True,
            "stream_options": {"include_usage": True},
            **settings.sampling,
        }
        if settings.max_tokens is not None:
            body["max_tokens"] = settings.max_tokens
        if settings.reasoning_budget is not None:
            body["thinking_budget_tokens"] = settings.reasoning_budget
        if settings.tools:
            body["tools"] = list(settings.tools)
        if settings.json is True:  # any object; a schema is a mapping
            body["response_format"] = {"type": "json_object"}
        elif settings.json:
            schema = {"name": "answer", "schema": settings.json}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        exchange = HttpExchange(self._address, self._headers)
        usage = AnswerUsage(n_ctx=self.n_ctx)
        return RemoteGeneration(exchange, lambda: self._send_request(exchange, "/v1/chat/completions", body), usage)

    def _ask_document(self, path: str, body: Mapping[str, object] | None = None) -> Value:
        with HttpExchange(self._address, self._headers) as exchange:
            self._send_request(exchange, path, body)
            try:
                answer = exchange.read(_MOST_ANSWER)
            except ConnectionLost as error:
                raise EngineError(f"{self._url}{path} broke off", hint="Is the port right?") from error
        return jsonread.parse(answer, f"{self._url}{path}", EngineError, hint=_OTHER_SERVER)

    def _send_request(self, exchange: HttpExchange, path: str, body: Mapping[str, object] | None) -> None:
        """POST a body, GET without one. The head of the answer has been read, and its status is 200."""
        try:
            exchange.connect(_CONNECT_SECONDS)
            status = exchange.send(path, body, seconds=None)  # a prompt may be long, and the user has Ctrl+C
            if status != 200:
                raise _refusal_error(status, exchange.read(_MOST_ERROR))
        except ConnectionLost as error:
            cause = error.__cause__
            reason = getattr(cause, "strerror", None) or str(error) or type(cause).__name__
            hint = _NO_TLS if isinstance(cause, ssl.SSLError) else "Start a server: stepgguf serve FILE.gguf"
            raise EngineError(f"{self._url}: {reason}", hint=hint) from error


class RemoteGeneration:
    """One answer under way. `send` sends the request: in the thread, as some servers say nothing before a token."""

    def __init__(self, exchange: HttpExchange, send: Callable[[], None], usage: AnswerUsage) -> None:
        self.usage = usage
        self._exchange = exchange
        self._cancelled = self._ended = False
        self._started = time.monotonic()
        self._first_delta = 0.0
        self._chunks: queue.SimpleQueue[Value | StepggufError | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._read_events, args=(send,), name="stepgguf-remote", daemon=True)
        self._thread.start()

    def next_updates(self, seconds: float | None) -> list[Progress] | None:
        if self._ended:
            return None
        try:
            chunk = self._chunks.get(timeout=seconds)
        except queue.Empty:
            return []
        if isinstance(chunk, Value):
            return self._read_chunk(chunk)
        self._ended = True
        if isinstance(chunk, StepggufError) and not self._cancelled:  # a socket that we shut is no error
            raise chunk
        if self._cancelled:
            self.usage.finish_reason = "cancelled"
        return None

    def end_reasoning(self) -> bool:
        return False

    def cancel(self) -> None:
        self._cancelled = not self._ended or self._cancelled  # after the end there is nothing to cancel
        self._exchange.interrupt()

    def close(self) -> None:
        self.cancel()
        self._thread.join(timeout=_CONNECT_SECONDS)  # while it connects, nothing can be shut yet
        self._exchange.close()
        self._ended = True

    def _read_chunk(self, chunk: Value) -> list[Progress]:
        if usage := chunk.get("usage"):
            self._take_usage(usage)
        deltas: list[Progress] = []
        for choice in _list_at(chunk, "choices"):
            if delta := choice.get("delta"):
                # servers have one of the two names, ours has both
                if reasoning := _text_at(delta, "reasoning_content") or _text_at(delta, "reasoning"):
                    deltas.append(Delta("reasoning", reasoning))
                if text := _text_at(delta, "content"):
                    deltas.append(Delta("text", text))
                for call in _list_at(delta, "tool_calls"):
                    deltas += _call_deltas(call)
            if reason := _text_at(choice, "finish_reason"):
                self.usage.finish_reason = reason
        self._count_deltas(deltas)
        return deltas

    def _count_deltas(self, deltas: list[Progress]) -> None:
        """Bring the usage up to date; a delta counts as a token until the server says better."""
        if not deltas:
            return
        now = time.monotonic()
        if not self._first_delta:
            self._first_delta = now
            self.usage.prompt_seconds = now - self._started
        self.usage.generation_seconds = now - self._first_delta
        n_reasoning = sum(isinstance(delta, Delta) and delta.kind == "reasoning" for delta in deltas)
        self.usage.n_reasoning += n_reasoning
        self.usage.n_text += len(deltas) - n_reasoning

    def _take_usage(self, counts: Value) -> None:
        usage = self.usage
        usage.n_prompt = _number_at(counts, "prompt_tokens") or 0
        if details := counts.get("prompt_tokens_details"):
            usage.n_cached = _number_at(details, "cached_tokens") or 0
        if details := counts.get("completion_tokens_details"):
            cut, n_reasoning = _text_at(details, "reasoning_cut"), _number_at(details, "reasoning_tokens")
            usage.budget_reached, usage.loop_broken = cut == "budget", cut == "loop"
            usage.n_reasoning = usage.n_reasoning if n_reasoning is None else n_reasoning
        # OpenAI's completion_tokens are all that were made, reasoning included.
        usage.n_text = max(0, (_number_at(counts, "completion_tokens") or 0) - usage.n_reasoning)

    def _read_events(self, send: Callable[[], None]) -> None:
        """In a thread of its own: every event into the queue, then an error or None."""
        end: StepggufError | None = EngineError("the server broke the answer off", hint="Its log may say why.")
        try:
            send()
            for event in self._exchange.events(seconds=None):
                if event == "[DONE]":
                    end = None
                    break
                chunk = jsonread.parse(
                    event.encode(), "the answer broke off: an event", EngineError, hint=_OTHER_SERVER
                )
                if chunk.get("error"):
                    end = _error_from_body(500, chunk.raw)
                    break
                self._chunks.put(chunk)
                if any(_text_at(choice, "finish_reason") for choice in _list_at(chunk, "choices")):
                    end = None  # not every server says [DONE]
        except StepggufError as error:
            end = error
        except ConnectionLost as error:
            end = EngineError(f"the answer broke off: {error}", hint="The server's log may say why.")
        self._chunks.put(end)


def _call_deltas(call: Value) -> Iterator[Delta]:
    function, index = call.get("function"), _number_at(call, "index") or 0
    if function is not None:
        if name := _text_at(function, "name"):
            yield Delta("call", name, index)
        if arguments := _text_at(function, "arguments"):
            yield Delta("arguments", arguments, index)


def _list_at(value: Value, key: str) -> list[Value]:
    """The members of a list, none if it is not there."""
    found = value.get(key)
    return found.array() if found is not None else []


def _text_at(value: Value, key: str) -> str:
    found = value.get(key)
    return found.text() if found is not None else ""


def _number_at(value: Value, key: str) -> int | None:
    found = value.get(key)
    return found.integer() if found is not None else None


def _refusal_error(status: int, body: bytes) -> StepggufError:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        value = {}
    return _error_from_body(status, value)


def _error_from_body(status: int, body: object) -> StepggufError:
    """What an error of OpenAI's form says, as one of ours."""
    error = body.get("error") if isinstance(body, dict) else None
    message = error.get("message") if isinstance(error, dict) else error if isinstance(error, str) else None
    if not isinstance(message, str) or not message:
        message = f"the server answered with status {status}"
    if status == 401:
        return RequestError(message, hint="Give the server's key: --api-key, or STEPGGUF_API_KEY.")
    if status == 429:
        return EngineBusy(message, retry_after=10)
    if 400 <= status < 500:
        return RequestError(message)
    return EngineError(message, hint="The server's log may say why.")
