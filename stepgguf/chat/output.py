"""The output machine: token ids in; reasoning, text and tool calls out.

    START --<think>--> REASONING              the answer starts here, or in REASONING if the prompt has opened it
    REASONING --</think>--> TEXT --<tool_call>--> CALL --</tool_call>--> TEXT
    REASONING --<tool_call>--> CALL           CALL --not a call--> TEXT, and what was not read of it is text

The machine switches on token ids and never on text: the same characters spelled out are characters. <tool_call> is
a switch only if tools were offered, </tool_call> only outside of a parameter's value (see call_reader.py); else they
are text too. One exception: a line that starts with `<function=NAME>`, NAME being an offered tool, is a call without
its <tool_call>. The template gives such a line no other meaning, and models forget the token.

A </think> outside of reasoning is never text. The model has reasoned in its answer then, and what came before belongs
to the reasoning: `Reply.settle_reasoning` moves it in whole answers; text that was streamed cannot be taken back.

One line break on each side of </think> and the white space around calls belong to the protocol. Bytes become text as
soon as they are whole characters. A stop ends the answer where its last character arrives, in TEXT only; no more is
held back than may be the start of one.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from stepgguf.chat.call_reader import CallReader
from stepgguf.chat.request import Tool
from stepgguf.runtime.engine import Step

DeltaKind = Literal["reasoning", "text", "call", "arguments"]
_WHITE_SPACE = " \t\r\n"
_FUNCTION_LINE = re.compile(r"^[ \t]*<function=([^>\n]*)>", re.MULTILINE)
_OPEN_TAG_LINE = re.compile(r"^[ \t]*(<[^>\n]*)\Z", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Markers:
    """Token ids of the protocol; None if the model lacks the token, or if it is text like any other."""

    end_of_reasoning: int | None  # </think>
    call: int | None  # <tool_call>
    end_of_call: int | None  # </tool_call>
    start_of_reasoning: int | None = None  # <think>


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of an answer. Its text is never empty. "call": a function's name; "arguments": the next of its JSON.

    index: which call of this answer; on "text", how many misplaced </think> came before. steps, on "text": the tokens
    since the last text, the one that completed it included; tokens of which no character was shown (a stop, white space
    before a call) are in none.
    """

    kind: DeltaKind
    text: str
    index: int = 0
    steps: tuple[Step, ...] = ()


class OutputMachine:
    """Reads one answer. Feed it tokens; `close` at the end gives what was held back.

    in_reasoning: the prompt ends inside it. n_reasoning, n_text: tokens that the model made, not those that were forced
    on it; <think> and </think> count as reasoning, calls as text. stopped: the stop that ended the answer: nothing is
    after it. n_misplaced: </think> outside of reasoning, before any call. cut_call: the index of a call that the end of
    generation cut off; its arguments are an unclosed prefix of JSON. warnings: what the model did wrong, in sentences.
    """

    def __init__(
        self, markers: Markers, *, in_reasoning: bool, tools: Sequence[Tool] = (), stops: Sequence[str] = ()
    ) -> None:
        self.n_reasoning = self.n_text = self.n_calls = self.n_misplaced = 0
        self.stopped: str | None = None
        self.cut_call: int | None = None
        self.warnings: list[str] = []
        self._markers = markers
        self._in_reasoning = in_reasoning
        self._starting = not in_reasoning and markers.start_of_reasoning is not None
        self._tools = {tool.name: tool for tool in tools}
        self._stops = tuple(stop for stop in stops if stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""  # text that may belong to the protocol or to a stop
        # What of the text's start belongs to the protocol: the line break after </think>, or all white space.
        self._dropped = "\n" if in_reasoning else ""
        self._line_starts = True  # what is held starts a line
        self._steps: list[Step] = []  # since the last delta that is not reasoning
        self._call: CallReader | None = None
        self._named = False  # the call's name has gone out
        self._opener = ""  # what stands before the call's text, should it turn out to be none
        self._just_opened = False  # <think> was the last token

    def feed(self, step: Step) -> list[Delta]:
        """Return what a token brings: often nothing, sometimes several deltas."""
        if self.stopped is not None:
            return []
        calls = bool(self._tools) and step.token_id == self._markers.call
        if self._starting and step.token_id == self._markers.start_of_reasoning:
            return self._start_reasoning()
        if self._in_reasoning and not calls:
            self.n_reasoning += not step.forced
            return self._feed_reasoning(step)
        self.n_text += not step.forced
        if self._call is not None and not (calls and self._call.has_ended):
            return self._feed_call(self._call, step)
        if calls:
            return self._start_tagged_call(step)
        if step.token_id == self._markers.end_of_reasoning:
            return self._end_misplaced_reasoning()
        self._steps.append(step)
        return self._feed_text(self._decoder.decode(step.piece))

    def close(self, *, cut: bool = False) -> list[Delta]:
        """Take the answer for over and return what is left of it. cut: it was not the model that ended it.

        Then what may be the start of a call is not shown as text: nobody can tell.
        """
        if self.stopped is not None:
            return []
        text = self._decoder.decode(b"", final=True)
        if self._in_reasoning:
            return self._make_deltas("reasoning", self._held + text)
        deltas = self._close_call(self._call, text, cut) if self._call is not None else self._feed_text(text)
        rest, self._held = self._held, ""
        if cut:
            rest = rest[: self._find_partial_function(rest)]
        return [*deltas, *self._make_deltas("text", rest)]

    # reasoning ---------------------------------------------------------------------------------------------------

    def _start_reasoning(self) -> list[Delta]:
        # what came before <think> was white space only, or the answer would have started: it becomes reasoning
        self.n_reasoning, self.n_text = self.n_text + 1, 0
        self._in_reasoning, self._starting = True, False
        self._held, self._dropped, self._just_opened = "", "\n", True
        self._steps.clear()
        return []

    def _feed_reasoning(self, step: Step) -> list[Delta]:
        if step.token_id == self._markers.end_of_reasoning:
            deltas = self._end_reasoning()
            self._held = ""
            return deltas
        text = self._held + self._decoder.decode(step.piece)
        if self._just_opened and text:
            self._just_opened, text = False, text.removeprefix("\n")
        self._held = "\n" if text.endswith("\n") else ""  # one that may stand before </think>
        return self._make_deltas("reasoning", text.removesuffix("\n"))

    def _end_reasoning(self) -> list[Delta]:
        self._in_reasoning = False
        rest = self._decoder.decode(b"", final=True)  # of a character that is not whole and never will be
        if not rest:
            return []
        text, self._held = self._held + rest, ""
        return self._make_deltas("reasoning", text)

    def _end_misplaced_reasoning(self) -> list[Delta]:
        deltas = self._feed_text(self._decoder.decode(b"", final=True))
        self.warnings.append("the model closes its thinking in its answer")
        if self.n_calls:  # reasoning after a call is no part of the protocol: the text stays text
            return deltas
        self.n_reasoning, self.n_text = self.n_reasoning + self.n_text, 0
        deltas += self._make_deltas("reasoning", self._held.rstrip(_WHITE_SPACE))
        self.n_misplaced += 1
        self._held, self._dropped, self._line_starts = "", "\n", True
        self._steps.clear()
        return deltas

    # text -------------------------------------------------------------------------------------------------------

    def _feed_text(self, text: str) -> list[Delta]:
        if not text:
            return []
        self._held += text
        if self._dropped and not self._drop_start():
            return []
        # Of several stops the one that is complete first counts, and of those that end together the longest.
        ends = [(self._held.find(stop) + len(stop), -len(stop), stop) for stop in self._stops if stop in self._held]
        if ends:
            end, _, self.stopped = min(ends)
            return self._show_held(end - len(self.stopped), keep=False)
        if self._starting and not self._held.strip(_WHITE_SPACE):
            return []  # a <think> may still come
        self._starting = False
        if (start := self._find_function()) is not None:
            return self._start_untagged_call(start)
        cut = start_of_partial(self._held, self._stops)
        if self._tools:  # a line that may start a call waits, and so does the white space before it
            begun = self._find_partial_function(self._held)
            cut = min(cut, len(self._held[:begun].rstrip(_WHITE_SPACE)))
        return self._show_held(cut)

    def _drop_start(self) -> bool:
        """Drop what of the text's start belongs to the protocol. False: so far that is all of it."""
        one = self._dropped == "\n"
        self._held = self._held.removeprefix("\n") if one else self._held.lstrip(self._dropped)
        if one or self._held:
            self._dropped = ""
        if not self._held:
            self._steps.clear()
        return bool(self._held)

    def _show_held(self, end: int, *, keep: bool = True) -> list[Delta]:
        """Give out what is held up to here; keep: the rest stays, to be given out later."""
        shown, self._held = self._held[:end], self._held[end:] if keep else ""
        self._line_starts = self._line_starts and not shown
        return self._make_deltas("text", shown)

    # calls ------------------------------------------------------------------------------------------------------

    def _find_function(self) -> int | None:
        """Where, in what is held, a call starts that lacks its <tool_call>."""
        found = _FUNCTION_LINE.finditer(self._held) if self._tools else ()
        return next((m.start() for m in found if m[1] in self._tools and (m.start() or self._line_starts)), None)

    def _find_partial_function(self, text: str) -> int | None:
        """Where the last line starts, if it may become the start of such a call."""
        last = _OPEN_TAG_LINE.search(text)
        if last is None or not (last.start() or self._line_starts):
            return None
        opening = any(f"<function={name}>".startswith(last[1]) for name in self._tools)
        return last.start() if opening else None

    def _start_untagged_call(self, start: int) -> list[Delta]:
        rest = self._held[start:]
        deltas = self._show_held(len(self._held[:start].rstrip(_WHITE_SPACE)), keep=False)
        self.warnings.append("a tool call has no <tool_call>")
        call = self._start_call("")
        return deltas + self._report_call(call, call.feed(rest))

    def _start_tagged_call(self, step: Step) -> list[Delta]:
        if self._in_reasoning:
            deltas, shown = self._end_reasoning(), ""
        elif self._call is not None:
            deltas, shown = self._report_call(self._call, self._call.finish()), ""
        else:
            deltas = self._feed_text(self._decoder.decode(b"", final=True))
            shown = self._held.rstrip(_WHITE_SPACE)
            deltas += self._make_deltas("text", shown)
        self._steps.append(step)
        self._start_call(self._held[len(shown) :] + step.piece.decode(errors="replace"))
        return deltas

    def _start_call(self, opener: str) -> CallReader:
        """Start reading a call. opener: what was read of it already, which is text if it turns out to be none."""
        self._opener, self._named, self._starting = opener, False, False
        self._held = self._dropped = ""
        self._call = CallReader(self._tools)
        return self._call

    def _feed_call(self, call: CallReader, step: Step) -> list[Delta]:
        self._steps.append(step)
        if step.token_id != self._markers.end_of_call:
            return self._report_call(call, call.feed(self._decoder.decode(step.piece)))
        fragment = call.feed(self._decoder.decode(b"", final=True))
        if call.in_value and not call.try_end():
            return self._report_call(call, fragment + call.feed(step.piece.decode(errors="replace")))
        deltas = self._report_call(call, fragment + call.finish())
        if call.name is None:  # it was no call, so </tool_call> is text as well
            return [*deltas, *self._feed_text(step.piece.decode(errors="replace"))]
        if self._call is call:  # the text after a broken one may have started another
            self._call = None
        return deltas

    def _close_call(self, call: CallReader, text: str, cut: bool) -> list[Delta]:
        deltas = [] if cut else self._report_call(call, call.feed(text))
        if call.problem is not None:
            return deltas
        if not cut and (call.name is None or call.try_end()):
            return deltas + self._report_call(call, call.finish())
        if call.name is None:
            return []
        self.cut_call = self.n_calls - 1
        return deltas + self._report_call(call, call.cut_off())

    def _report_call(self, call: CallReader, fragment: str) -> list[Delta]:
        """Give out what a call brought: its name, a fragment, and text once it is broken."""
        deltas = []
        if call.name is not None and not self._named:
            self._named, self._opener, self._line_starts = True, "", True
            self.n_calls += 1
            self._dropped = _WHITE_SPACE
            deltas += self._make_deltas("call", call.name)
        deltas += self._make_deltas("arguments", fragment)
        self.warnings += call.warnings
        call.warnings.clear()
        if call.problem is not None:
            self.warnings.append(f"a tool call {call.problem}")
            self._call = None
            text, self._opener = self._opener + call.rest, ""
            deltas += self._feed_text(text)
        return deltas

    def _make_deltas(self, kind: DeltaKind, text: str) -> list[Delta]:
        if not text:
            return []
        if kind == "reasoning":
            return [Delta(kind, text)]
        steps, self._steps = tuple(self._steps), []
        if kind == "text":
            return [Delta(kind, text, self.n_misplaced, steps)]
        return [Delta(kind, text, self.n_calls - 1)]


def start_of_partial(text: str, ends: Iterable[str]) -> int:
    """Return where a suffix of `text` starts that may become one of `ends`; the text's length if there is none."""
    ends = tuple(ends)
    longest = max(map(len, ends), default=0)
    for i in range(max(0, len(text) - longest + 1), len(text)):
        if any(end.startswith(text[i:]) for end in ends):
            return i
    return len(text)
