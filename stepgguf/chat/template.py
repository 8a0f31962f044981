"""Chat templates: messages in, prompt text out, with the template that the model file carries.

A template is code from a file that somebody else wrote. It runs in a process of its own, whose limits hold whatever it
does; renderer.py says why, and which conventions it follows.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from stepgguf.errors import BadMetadata, TemplateRefused
from stepgguf.files import textfile

Message = Mapping[str, Any]
Place = Literal["reasoning", "answer", "start"]  # where a prompt ends; start: the model may open its thinking, or not

CLOSING_WORDS = "I have to stop thinking and answer now."  # without any, models think on in their answer

_EOS = "<|im_end|>"  # of all Step-3 models
_START = "import sys; sys.path[:] = sys.argv[1:]; from stepgguf.chat.renderer import main; main()"
_REPLACE = "Use another: `--chat-template FILE` when converting, or `stepgguf template FILE.gguf NEW.jinja`."
_MOST_BYTES = 2**20  # the published ones have 5 KB
_PROBE: Sequence[Message] = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How is the weather in Paris?"},
    {
        "role": "assistant",
        "content": "",
        "reasoning_content": "I look it up.",
        "tool_calls": [{"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}],
    },
    {"role": "tool", "content": "21 degrees"},
    {"role": "assistant", "content": "It is 21 degrees in Paris."},
    {"role": "user", "content": "And in Rome?"},
)
_PROBE_TOOL = {"type": "function", "function": {"name": "get_weather", "description": "The weather.", "parameters": {}}}


class ChatTemplate:
    """A compiled template. `source` is jinja2 text; BadMetadata if it does not compile. Thread-safe."""

    def __init__(self, source: str, *, bos_token: str = "") -> None:
        self._source, self._bos_token = source, bos_token
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._compile()

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The prompt text. TemplateRefused: the template raises, or takes more time, memory or text than it may."""
        variables = {
            "messages": messages,
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
            "bos_token": self._bos_token,
            "eos_token": _EOS,
        }
        answer = self._answer(variables)
        if "error" in answer:
            raise TemplateRefused(
                f"the chat template cannot render these messages: {answer['error']}", param="messages", hint=_REPLACE
            )
        return answer["text"]

    def probe(self) -> str:
        """Render a conversation that has everything in it. BadMetadata: that fails, or the template leaves it out."""
        try:
            text = self.render(_PROBE, tools=[_PROBE_TOOL])
        except TemplateRefused as error:
            raise BadMetadata(f"tried with a tool call and its result: {error.message}", hint=_REPLACE) from error
        if not all(message["content"] in text for message in _PROBE if message["role"] == "user"):
            raise BadMetadata(
                "the chat template leaves out what the user says: it does not use `messages`", hint=_REPLACE
            )
        return text

    def _answer(self, variables: Mapping[str, Any]) -> dict[str, str]:
        with self._lock:
            if self._process is None:
                self._compile()
            return self._ask(variables)

    def _compile(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl+C is not for it
        )
        weakref.finalize(self, _end, self._process)
        answer = self._ask({"source": self._source})
        if "error" in answer:
            raise BadMetadata(f"the chat template does not compile: {answer['error']}", hint=_REPLACE)

    def _ask(self, question: Mapping[str, Any]) -> dict[str, str]:
        try:
            written = json.dumps(question).encode() + b"\n"
        except RecursionError:
            return {"error": "they nest too deep"}
        process, line = self._process, b""
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(written)
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = b""
        finally:
            if not line:  # it died, or we were interrupted
                self._process = None
                _end(process)
        if line:
            answer: dict[str, str] = json.loads(line)
            return answer
        too_long = process.returncode == -signal.SIGXCPU
        return {"error": "it takes too long" if too_long else f"its process ended with {process.returncode}"}


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(BrokenPipeError):  # what it has not read
                pipe.close()


def read(path: Path) -> str:
    """A template's text from a file. BadMetadata: it cannot be read, is no text, or does not render a conversation."""
    text = textfile.read(path, BadMetadata, most=_MOST_BYTES)
    try:
        ChatTemplate(text).probe()
    except BadMetadata as error:
        raise BadMetadata(f"{path}: {error.message}", hint=error.hint) from error
    return text


def closing(words: str, *, after: bool) -> str:
    """What ends a thinking that is cut: words as if they were the model's own, and what the template writes then.

    after: some thinking stands before.
    """
    paragraph = "\n\n" if after and words else ""
    return f"{paragraph}{words}\n</think>\n"


def place_of(prompt: str) -> Place:
    """Where a rendered prompt ends, by its last word."""
    text = prompt.rstrip()
    if text.endswith("<think>"):
        return "reasoning"
    return "answer" if text.endswith("</think>") else "start"


def normalize(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as the published templates need them.

    Contents and reasoning are trimmed: stray whitespace in the history drives this model into reasoning loops
    (llama.cpp issue 24181). Text parts that follow each other are one text, with a line break in between. Tool
    arguments given as a JSON string, as OpenAI clients send them back, become a mapping, because the 3.5 template
    iterates over its items. Old reasoning may come as `reasoning_content`, `reasoning`, `reasoning_details` or inside
    <think> in the content; the first that says something counts, they are never joined. The role `developer` is
    `system` to this model. Claude Code's billing line is left out of it, whatever dialect it came in.
    """
    result = []
    for message in messages:
        item = {key: value for key, value in message.items() if key not in ("reasoning", "reasoning_details")}
        if item.get("role") == "developer":
            item["role"] = "system"
        content = item.get("content")
        if isinstance(content, str):
            item["content"] = content.strip()
        elif isinstance(content, list):
            item["content"] = _joined(content)
        else:
            item["content"] = ""
        if item.get("role") == "system":
            item["content"] = _without_billing(item["content"])
            if content and not item["content"]:
                continue
        if item.get("role") == "assistant":
            _separate_reasoning(item, message)
        if item.get("tool_calls"):
            item["tool_calls"] = [_parsed(call) for call in item["tool_calls"]]
        result.append(item)
    return result


# Claude Code puts this line before its system prompt. It changes with every request, so with it no request would find
# its prefix in the cache; it says nothing to a model.
_BILLING = "x-anthropic-billing-header:"


def _without_billing(content: str | list[Any]) -> str | list[Any]:
    if isinstance(content, str):
        return "\n".join(line for line in content.split("\n") if not line.startswith(_BILLING)).strip()
    return [{**part, "text": _without_billing(part["text"])} if _is_text(part) else part for part in content]


def _separate_reasoning(item: dict[str, Any], message: Message) -> None:
    """Put the reasoning of an assistant's message into reasoning_content, and only there."""
    inline = ""
    if isinstance(item["content"], str) and "</think>" in item["content"] and item["content"].startswith("<think>"):
        inline, _, item["content"] = item["content"].removeprefix("<think>").partition("</think>")
        item["content"] = item["content"].strip()
    details = message.get("reasoning_details")
    texts = [d.get("text") for d in details if isinstance(d, Mapping)] if isinstance(details, list) else []
    told = "".join(text for text in texts if isinstance(text, str))
    spellings = (message.get("reasoning_content"), message.get("reasoning"), told, inline)
    item.pop("reasoning_content", None)
    reasoning = next((s.strip() for s in spellings if isinstance(s, str) and s.strip()), None)
    if reasoning is not None:
        item["reasoning_content"] = reasoning


def _joined(parts: Sequence[Any]) -> str | list[Any]:
    """The parts of a content: one text if that is all, trimmed at its outer ends only."""
    joined: list[Any] = []
    for is_text, run in groupby(parts, _is_text):
        same = list(run)
        joined += [{"type": "text", "text": "\n".join(part["text"] for part in same)}] if is_text else same
    if joined and _is_text(joined[0]):
        joined[0]["text"] = joined[0]["text"].lstrip()
    if joined and _is_text(joined[-1]):
        joined[-1]["text"] = joined[-1]["text"].rstrip()
    return joined[0]["text"] if len(joined) == 1 and _is_text(joined[0]) else joined


def _is_text(part: Any) -> bool:
    return isinstance(part, Mapping) and isinstance(part.get("text"), str)


def _parsed(call: Mapping[str, Any]) -> dict[str, Any]:
    function = dict(call.get("function", call))
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            function["arguments"] = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            function["arguments"] = None
    if not isinstance(function.get("arguments"), Mapping):
        function["arguments"] = {} if not arguments else {"arguments": arguments}
    return {**call, "function": function} if "function" in call else function
