"""What one message of a user costs, over all the requests that an agent makes of it.

    user: "mend the test" ─┬─ request 1: a call ── its result ─┬─ request 2: a call ── ... ── request N: the answer
                           └────────────── one task, with one account ───────────────┘

A task is known by what the client calls the conversation (prompt_cache_key, session_id, metadata.user_id), by the
system prompt that it begins with, and by everything that a user has written in it, in order. The assistant's turns and
the results of tools are not looked at: agents shorten them as the conversation grows, and leave thinking out.

What programs write under a user's name is not a user's: reminders that Claude Code puts into messages, old ones too,
and its "go on" after an answer that was cut. Whatever else changes what the user has written begins a new task: a
summary in place of an old conversation, a hook that speaks as the user. Two conversations that begin alike, and are not
named, count as one. The limits are there for models that lose their way, not against somebody who wants to pass them.

The accounts are in memory, bounded in number, and forgotten an hour after their last use.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

from stepgguf.chat.messages import normalize_messages
from stepgguf.chat.request import ChatRequest
from stepgguf.runtime.engine import Timings
from stepgguf.server.config import ServerConfig
from stepgguf.server.metrics import Metrics
from stepgguf.server.problem import Refusal

log = logging.getLogger(__name__)
MOST_TASKS = 4096
FORGET_SECONDS = 3600.0
_REMINDER = re.compile(r"<system-reminder>.*?</system-reminder>", re.DOTALL)
_GO_ON = "Output token limit hit. Resume directly"  # Claude Code, when max_tokens has ended an answer
# What Codex writes above the output of each command: it is never the same.
_OF_ONE_RUN = re.compile(r"^(?:Chunk ID: \w+|Wall time: [\d.]+ seconds)$", re.MULTILINE)

Message = Mapping[str, Any]  # as normalize_messages gives them


@dataclass(slots=True)
class Task:
    """The account of a task. `id`: for the log. Counts are of requests, and of tokens that the model has made for them;
    used: by the clock of time.monotonic."""

    id: str
    n_requests: int = 0
    n_generated: int = 0
    n_reasoning: int = 0
    used: float = 0.0

    def __str__(self) -> str:
        return f"task {self.id}: {self.n_requests} requests, {self.n_generated} tokens, {self.n_reasoning} of thinking"

    def count(self, timings: Timings) -> None:
        """Add what an answer has cost, however it ended."""
        self.n_generated += timings.n_generated
        self.n_reasoning += timings.n_reasoning


class TaskLedger:
    """The accounts of all tasks, and what the limits of the configuration leave to each request. Without a limit no
    account is kept. May be used from any thread."""

    def __init__(
        self, config: ServerConfig, metrics: Metrics, *, most: int = MOST_TASKS, seconds: float = FORGET_SECONDS
    ) -> None:
        self._config, self._metrics = config, metrics
        self._most, self._seconds = most, seconds
        self._tasks: dict[bytes, Task] = {}  # the one that was used last is the last
        self._lock = threading.Lock()

    def admit(self, request: ChatRequest) -> tuple[ChatRequest, Task | None]:
        """Return the request within what is left to its task, and the account that its answer is counted in.

        Requests that run at the same time each get what is left when they begin. Refusal: the tokens are used up.
        """
        config = self._config
        if config.task_tokens is None and config.task_reasoning is None and config.task_repeats is None:
            return request, None
        messages = normalize_messages(request.messages)
        task = self._open(_task_key(request.conversation, messages))
        request = self._within_tokens(self._within_reasoning(request, task), task)
        return self._without_loop(request, messages, task), task

    def _open(self, key: bytes) -> Task:
        now = time.monotonic()
        with self._lock:
            for old in [*takewhile(lambda k: self._tasks[k].used < now - self._seconds, self._tasks)]:
                del self._tasks[old]
            task = self._tasks.pop(key, None) or Task(key.hex()[:8])
            if len(self._tasks) >= self._most:
                del self._tasks[next(iter(self._tasks))]
            task.used = now
            task.n_requests += 1
            self._tasks[key] = task
        return task

    def _within_reasoning(self, request: ChatRequest, task: Task) -> ChatRequest:
        if self._config.task_reasoning is None:
            return request
        left = max(0, self._config.task_reasoning - task.n_reasoning)
        if left == 0:
            self._metrics.count_task_limit("reasoning")
        return replace(request, reasoning_budget=_least(request.reasoning_budget, left))

    def _within_tokens(self, request: ChatRequest, task: Task) -> ChatRequest:
        limit = self._config.task_tokens
        if limit is None:
            return request
        left = limit - task.n_generated
        if left <= 0:
            self._metrics.count_task_limit("tokens")
            raise Refusal(
                400,
                f"this task has used up the {limit:,} tokens that the server allows it (--task-tokens); "
                "the next message of the user begins a new one",
                code="task_tokens_used_up",
            )
        # With a budget for the thinking something is left for the answer.
        budget = request.reasoning_budget if request.max_tokens is not None and request.max_tokens <= left else left
        return replace(
            request,
            max_tokens=_least(request.max_tokens, left),
            reasoning_budget=_least(request.reasoning_budget, budget),
        )

    def _without_loop(self, request: ChatRequest, messages: Sequence[Message], task: Task) -> ChatRequest:
        most = self._config.task_repeats
        if most is None or request.tool_choice.mode != "auto" or repeated_calls(messages) < most:
            return request
        text = "task %s: the same calls have had the same results %d times in a row; this answer may not call"
        log.warning(text, task.id, most)
        self._metrics.count_task_limit("repeats")
        return replace(request, withhold_calls=True)


def repeated_calls(messages: Sequence[Message]) -> int:
    """Return how many times in a row, at the end of the conversation, the same calls have had the same results.

    Names, arguments and results count, text and thinking beside them do not.
    """
    rounds: list[tuple[list[str], list[str]]] = []
    for message in messages:
        if _written_by_user(message):
            rounds = []
        elif message["role"] == "assistant":
            calls = [_comparable_call(call) for call in message.get("tool_calls") or ()]
            if rounds and not rounds[-1][1]:
                rounds[-1][0].extend(calls)  # its calls came in several messages
            else:
                rounds.append((calls, []))
        elif message["role"] == "tool" and rounds:
            rounds[-1][1].append(_OF_ONE_RUN.sub("", _text(message)))
    newest = rounds[-1] if rounds and all(rounds[-1]) else None
    return sum(1 for _ in takewhile(lambda found: found == newest, reversed(rounds)))


def _task_key(conversation: str, messages: Sequence[Message]) -> bytes:
    first_system = [_text(message) for message in takewhile(lambda m: m["role"] == "system", messages)]
    written = [text for text in map(_written_by_user, messages) if text]
    return hashlib.sha256(json.dumps([conversation, first_system, written]).encode()).digest()


def _written_by_user(message: Message) -> str:
    """Return what a user has written in a message; nothing if it is not a user's."""
    text = _REMINDER.sub("", _text(message)).strip() if message["role"] == "user" else ""
    return "" if text.startswith(_GO_ON) else text


def _text(message: Message) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "\n".join(str(part.get("text", part)) for part in content)


def _comparable_call(call: Mapping[str, Any]) -> str:
    function = call.get("function", call)
    return json.dumps([function.get("name"), function.get("arguments")], sort_keys=True)


def _least(a: int | None, b: int | None) -> int | None:
    return min((n for n in (a, b) if n is not None), default=None)
