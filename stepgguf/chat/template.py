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
from pathlib import Path
from typing import Literal

from stepgguf.chat.messages import ChatMessage
from stepgguf.errors import BadMetadata, TemplateRefused
from stepgguf.files import textfile

PromptEnding = Literal["reasoning", "answer", "start"]  # where it ends; start: the model may open its reasoning, or not

CLOSING_WORDS = "I have to stop thinking and answer now."  # without any, models think on in their answer

_EOS = "<|im_end|>"  # of all Step-3 models
_START_RENDERER = "import sys; sys.path[:] = sys.argv[1:]; from stepgguf.chat.renderer import main; main()"
_REPLACE = "Use another: `--chat-template FILE` when converting, or `stepgguf template FILE.gguf NEW.jinja`."
_MOST_BYTES = 2**20  # the published ones have 5 KB
_PROBE_MESSAGES: Sequence[ChatMessage] = (
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
        messages: Sequence[ChatMessage],
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """Return the prompt text. TemplateRefused: the template raises, or takes more time or memory than it may."""
        variables = {
            "messages": messages,
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
            "bos_token": self._bos_token,
            "eos_token": _EOS,
        }
        with self._lock:
            if self._process is None:  # the last rendering ended it
                self._compile()
            answer = self._ask_process(variables)
        if "error" in answer:
            raise TemplateRefused(
                f"the chat template cannot render these messages: {answer['error']}",
                param="messages",
                hint=_REPLACE,
            )
        return answer["text"]

    def probe(self) -> str:
        """Render a conversation that has everything in it. BadMetadata: that fails, or leaves the questions out."""
        try:
            text = self.render(_PROBE_MESSAGES, tools=[_PROBE_TOOL])
        except TemplateRefused as error:
            raise BadMetadata(f"tried with a tool call and its result: {error.message}", hint=_REPLACE) from error
        if not all(message["content"] in text for message in _PROBE_MESSAGES if message["role"] == "user"):
            raise BadMetadata(
                "the chat template leaves out what the user says: it does not use `messages`", hint=_REPLACE
            )
        return text

    def _compile(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START_RENDERER, *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl+C is not for it
        )
        weakref.finalize(self, _end_process, self._process)
        answer = self._ask_process({"source": self._source})
        if "error" in answer:
            raise BadMetadata(f"the chat template does not compile: {answer['error']}", hint=_REPLACE)

    def _ask_process(self, question: Mapping[str, object]) -> dict[str, str]:
        """Write a line, read a line: {"text": ...} or {"error": ...}; see renderer.py."""
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
            if not line:  # it died, or we were interrupted: then its answer would be taken for the next one's
                self._process = None
                _end_process(process)
        if line:
            answer: dict[str, str] = json.loads(line)
            return answer
        too_long = process.returncode == -signal.SIGXCPU
        return {"error": "it takes too long" if too_long else f"its process ended with {process.returncode}"}


def _end_process(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(BrokenPipeError):  # what it has not read
                pipe.close()


def read_template(path: Path) -> str:
    """Return a template's text. BadMetadata: the file cannot be read, is no text, or renders no conversation."""
    text = textfile.read(path, BadMetadata, most=_MOST_BYTES)
    try:
        ChatTemplate(text).probe()
    except BadMetadata as error:
        raise BadMetadata(f"{path}: {error.message}", hint=error.hint) from error
    return text


def closing_text(words: str, *, after: bool) -> str:
    """Return what ends a reasoning that is cut: words as if the model's own, and what the template writes after them.

    after: some reasoning stands before, so the words are a paragraph of their own.
    """
    paragraph = "\n\n" if after and words else ""
    return f"{paragraph}{words}\n</think>\n"


def prompt_ending(prompt: str) -> PromptEnding:
    """Return where a rendered prompt ends, by its last word."""
    text = prompt.rstrip()
    if text.endswith("<think>"):
        return "reasoning"
    return "answer" if text.endswith("</think>") else "start"
