"""The output machine: token ids in; reasoning, text and tool calls out.

    THINK --</think>--> TEXT --<tool_call>--> CALL --</tool_call>--> TEXT
    THINK --<tool_call>--> CALL               CALL --not a call--> TEXT, and what was not read of it is text

The machine switches on token ids and never on text: the same characters spelled out are characters. <tool_call> is
a switch only if tools were offered, </tool_call> only outside of a parameter's value (see tools.py); else they are
text too. One line break on each side of </think> and the white space around calls belong to the protocol. Bytes
become text as soon as they are whole characters. A stop ends the answer where its last character arrives, in TEXT
only; no more is held back than may be the start of one.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from stepgguf.chat.request import Tool
from stepgguf.chat.tools import CallReader, held_from
from stepgguf.runtime.engine import Step

Kind = Literal["reasoning", "text", "call", "arguments"]
_SPACE = " \t\r\n"


@dataclass(frozen=True, slots=True)
class Markers:
    """Token ids of the protocol; None if the model lacks the token."""

    end_of_thinking: int  # </think>
    call: int | None  # <tool_call>
    end_of_call: int | None  # </tool_call>


@dataclass(frozen=True, slots=True)
class Delta:
    """text is never empty. "call": the function's name; "arguments": the next fragment of its JSON.

    index: which call of this answer. steps, on "text": the tokens since the last text, the one that completed it
    included; tokens of which no character was shown (a stop, white space before a call) are in none.
    """

    kind: Kind
    text: str
    index: int = 0
    steps: tuple[Step, ...] = ()


class OutputMachine:
    """Feed it tokens; `close` at the end gives what was held back.

    n_reasoning, n_text: tokens; </think> counts as reasoning, calls as text. stopped: the stop that ended the answer;
    nothing comes after it. warnings: what the model did wrong, in sentences.
    """

    def __init__(
        self, markers: Markers, *, thinking: bool, tools: Sequence[Tool] = (), stops: Sequence[str] = ()
    ) -> None:
        self.n_reasoning = self.n_text = self.n_calls = 0
        self.stopped: str | None = None
        self.warnings: list[str] = []
        self._markers = markers
        self._thinking = thinking
        self._tools = {tool.name: tool for tool in tools}
        self._stops = tuple(stop for stop in stops if stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""  # text that may belong to the protocol or to a stop
        # What of the text's start belongs to the protocol: the line break after </think>, or all white space.
        self._dropped = "\n" if thinking else ""
        self._steps: list[Step] = []  # since the last delta that is not reasoning
        self._call: CallReader | None = None
        self._opener = ""  # what stands before the call's text, should it turn out to be none

    def feed(self, step: Step) -> list[Delta]:
        if self.stopped is not None:
            return []
        calls = bool(self._tools) and step.token_id == self._markers.call
        if self._thinking and not calls:
            self.n_reasoning += 1
            return self._reasoning(step)
        self.n_text += 1
        if self._call is not None and not (calls and self._call.ended):
            return self._in_call(self._call, step)
        if calls:
            return self._open_call(step)
        self._steps.append(step)
        return self._text(self._decoder.decode(step.piece))

    def close(self) -> list[Delta]:
        """The end of generation."""
        if self.stopped is not None:
            return []
        text = self._decoder.decode(b"", final=True)
        if self._thinking:
            return self._deltas("reasoning", self._held + text)
        if self._call is not None:
            deltas = self._progress(self._call, self._call.feed(text) + self._call.finish())
        else:
            deltas = self._text(text)
        rest, self._held = self._held, ""
        return [*deltas, *self._deltas("text", rest)]

    def _reasoning(self, step: Step) -> list[Delta]:
        if step.token_id == self._markers.end_of_thinking:
            deltas = self._end_thinking()
            self._held = ""
            return deltas
        text = self._held + self._decoder.decode(step.piece)
        self._held = "\n" if text.endswith("\n") else ""  # one that may stand before </think>
        return self._deltas("reasoning", text.removesuffix("\n"))

    def _end_thinking(self) -> list[Delta]:
        self._thinking = False
        rest = self._decoder.decode(b"", final=True)
        if not rest:
            return []
        text, self._held = self._held + rest, ""
        return self._deltas("reasoning", text)

    def _text(self, text: str) -> list[Delta]:
        if not text:
            return []
        self._held += text
        if self._dropped:
            one = self._dropped == "\n"
            self._held = self._held.removeprefix("\n") if one else self._held.lstrip(self._dropped)
            if one or self._held:
                self._dropped = ""
            if not self._held:
                self._steps.clear()
                return []
        ends = [(self._held.find(stop) + len(stop), -len(stop), stop) for stop in self._stops if stop in self._held]
        if ends:
            end, _, self.stopped = min(ends)
            cut = end - len(self.stopped)
        else:
            cut = held_from(self._held, self._stops)
            if self._tools:
                cut = min(cut, len(self._held.rstrip(_SPACE)))
        shown, self._held = self._held[:cut], "" if ends else self._held[cut:]
        return self._deltas("text", shown)

    def _open_call(self, step: Step) -> list[Delta]:
        if self._thinking:
            deltas, shown = self._end_thinking(), ""
        else:
            deltas = self._text(self._decoder.decode(b"", final=True))
            shown = self._held.rstrip(_SPACE)
            deltas += self._deltas("text", shown)
        self._steps.append(step)
        self._opener = self._held[len(shown) :] + step.piece.decode(errors="replace")
        self._held = self._dropped = ""
        self._call = CallReader(self._tools)
        return deltas

    def _in_call(self, call: CallReader, step: Step) -> list[Delta]:
        self._steps.append(step)
        if step.token_id != self._markers.end_of_call or call.in_value:
            return self._progress(call, call.feed(self._decoder.decode(step.piece)))
        deltas = self._progress(call, call.feed(self._decoder.decode(b"", final=True)) + call.finish())
        if call.name is None:
            return [*deltas, *self._text(step.piece.decode(errors="replace"))]
        self._call = None
        return deltas

    def _progress(self, call: CallReader, fragment: str) -> list[Delta]:
        """What a call gave: its name, a fragment, and text once it is broken."""
        deltas = []
        if call.name is not None and self._opener:
            self._opener = ""
            self.n_calls += 1
            self._dropped = _SPACE
            deltas += self._deltas("call", call.name)
        deltas += self._deltas("arguments", fragment)
        self.warnings += call.warnings
        call.warnings.clear()
        if call.problem is not None:
            self.warnings.append(f"a tool call {call.problem}")
            self._call = None
            text, self._opener = self._opener + call.rest, ""
            deltas += self._text(text)
        return deltas

    def _deltas(self, kind: Kind, text: str) -> list[Delta]:
        if not text:
            return []
        if kind == "reasoning":
            return [Delta(kind, text)]
        steps, self._steps = tuple(self._steps), []
        return [Delta(kind, text, steps=steps)] if kind == "text" else [Delta(kind, text, self.n_calls - 1)]
