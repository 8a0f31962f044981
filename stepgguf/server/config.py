"""What a server is told at its start. Made by the command line, passed explicitly, never changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from stepgguf.chat.request import EFFORTS

ALIASES = ("step-3.5-flash", "stepfun/step-3.5-flash", "stepfun-ai/step-3.5-flash")  # StepFun's, OpenRouter's, NVIDIA's


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """How a server behaves towards its clients.

    model_ids: the file's id first; ALIASES are accepted besides. host: what the server is bound to; on a loopback
    address a request must name one in its Host header. allowed_hosts: names that it may have besides. strict: refuse
    unknown fields and models, instead of ignoring the ones and serving the others.

    max_body_bytes: 262,144 tokens are about 1.2 MB of English and 2.5 MB of escaped Chinese; tools and quoting come on
    top. max_json_depth: a level of a JSON schema costs two or three. A stream that has nothing to say says that it is
    alive every keep_alive_seconds. A client that has not taken what was written for slow_client_seconds, or not sent
    its body in body_seconds, is let go.

    max_n: answers of one request. efforts: as EFFORTS, with all its keys. stored_*: how many answers of the Responses
    dialect are kept, and how long after their last use.

    task_*: limits of what one message of a user may cost, over all requests that are made of it; None is none. tokens:
    that the model makes; reasoning: tokens of thinking among them; repeats: so many times in a row the same calls with
    the same results, and the next answer calls nothing. See tasks.py.
    """

    model_ids: tuple[str, ...]
    host: str = "127.0.0.1"
    allowed_hosts: tuple[str, ...] = ()
    strict: bool = False
    api_key: str | None = None
    cors_origins: tuple[str, ...] = ()
    max_body_bytes: int = 8 * 2**20
    max_json_depth: int = 128
    body_seconds: float = 60.0
    keep_alive_seconds: float = 10.0
    slow_client_seconds: float = 60.0
    efforts: Mapping[str, int | None] = field(default_factory=lambda: EFFORTS)
    max_n: int = 8
    stored_answers: int = 1024
    stored_bytes: int = 64 * 2**20
    stored_seconds: float = 3600.0
    task_tokens: int | None = None
    task_reasoning: int | None = None
    task_repeats: int | None = None

    @property
    def known_ids(self) -> tuple[str, ...]:
        """Every id that a request may name, each once."""
        return tuple(dict.fromkeys((*self.model_ids, *ALIASES)))
