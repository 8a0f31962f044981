"""A server of ours that runs: found by what it answers."""

from __future__ import annotations

from dataclasses import dataclass, replace

from stepgguf.errors import EngineError
from stepgguf.files import jsonread
from stepgguf.files.jsonread import Value
from stepgguf.runtime.http_events import ConnectionLost, HttpExchange, ServerAddress, bearer_header

NO_KEY = "no-key-is-needed"
_SECONDS = 10.0
_MOST_BYTES = 2**20
_START = "Start one: stepgguf serve FILE.gguf. Or give --model FILE.gguf, and it is started for you."


@dataclass(frozen=True, slots=True)
class ModelServer:
    """url: without /v1 and without a slash at the end. model: the id of what it serves. n_ctx: the longest prompt and
    answer of one request, tokens. key: what clients send; a server that wants none takes any."""

    url: str
    model: str
    n_ctx: int
    key: str = NO_KEY


def find_server(url: str, api_key: str | None) -> ModelServer:
    """Return the server at an address, with or without /v1. api_key: sent only if it asks for a key.

    EngineError: nobody answers there, or somebody else, or a key is needed that was not given.
    """
    try:
        address = ServerAddress.parse(url if "//" in url else f"http://{url}")
    except ValueError:
        raise EngineError(f"{url}: not a server's address", hint="Write for example http://127.0.0.1:8080.") from None
    address = replace(address, path=address.path.removesuffix("/v1"))
    status, health = _ask(address, "/health", NO_KEY)  # it wants no key for this
    if status != 200 or health is None or not _is_ours(health.raw):
        raise EngineError(f"{address.url} is not a server of stepgguf", hint=_START)
    key = NO_KEY
    status, listed = _ask(address, "/v1/models", key)
    if status == 401:
        if not api_key:
            raise EngineError(f"the server at {address.url} wants a key", hint="Set STEPGGUF_API_KEY to it.")
        key = api_key
        status, listed = _ask(address, "/v1/models", key)
    if status == 401:
        raise EngineError(
            f"the server at {address.url} does not take the key", hint="Is STEPGGUF_API_KEY the one that it has?"
        )
    models = listed["data"].array() if listed is not None else []
    if not models:
        raise EngineError(f"{address.url}/v1/models lists no model", hint=_START)
    return ModelServer(address.url, models[0]["id"].text(), models[0]["context_length"].integer(1), key)


def _is_ours(health: object) -> bool:
    """Whether a server says of its health what ours does; llama-server's and others' have no counts."""
    return isinstance(health, dict) and {"status", "running", "queued"} <= health.keys()


def _ask(address: ServerAddress, path: str, key: str) -> tuple[int, Value | None]:
    """Return the status of a GET, and its document if it is one of JSON."""
    with HttpExchange(address, bearer_header(key)) as exchange:
        try:
            exchange.connect(_SECONDS)
            status = exchange.send(path, None, seconds=_SECONDS)
            answer = exchange.read(_MOST_BYTES)
        except ConnectionLost as error:
            reason = getattr(error.__cause__, "strerror", None) or str(error) or type(error.__cause__).__name__
            raise EngineError(f"there is no server at {address.url}: {reason}", hint=_START) from error
    try:
        return status, jsonread.parse(answer, f"{address.url}{path}", EngineError, hint=_START)
    except EngineError:
        return status, None
