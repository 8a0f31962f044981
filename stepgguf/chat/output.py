"""The output machine: token ids in, reasoning and text out.

    THINK --</think>--> TEXT --</think>--> TEXT (written out)

The prompt ends inside <think>, so the machine starts in THINK. It switches on the token id and never on text: the
same characters spelled out in the reasoning are reasoning. One line break on each side of </think> belongs to the
protocol and is dropped. Bytes become text as soon as they are whole characters.
"""

from __future__ import annotations

import codecs
from dataclasses import dataclass
from typing import Literal

Kind = Literal["reasoning", "text"]


@dataclass(frozen=True, slots=True)
class Delta:
    kind: Kind
    text: str


class OutputMachine:
    """Feed it tokens; `close` at the end gives what was held back."""

    def __init__(self, end_of_thinking: int | None) -> None:
        self.kind: Kind = "text" if end_of_thinking is None else "reasoning"
        self.n_reasoning = self.n_text = 0  # tokens; </think> counts as reasoning
        self._end = end_of_thinking
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""  # a line break that may stand before </think>
        self._at_start = True  # of the reasoning or of the text

    def feed(self, token_id: int, piece: bytes) -> list[Delta]:
        if self.kind == "reasoning":
            self.n_reasoning += 1
            if token_id == self._end:
                rest = self._decoder.decode(b"", final=True)
                self._decoder.reset()
                self.kind, self._held, self._at_start = "text", "", True
                return [Delta("reasoning", rest)] if rest else []
        else:
            self.n_text += 1
        return self._text(self._decoder.decode(piece))

    def close(self) -> list[Delta]:
        text = self._held + self._decoder.decode(b"", final=True)
        self._held = ""
        return [Delta(self.kind, text)] if text else []

    def _text(self, text: str) -> list[Delta]:
        if not text:
            return []
        if self.kind == "text":
            if self._at_start:
                text = text.removeprefix("\n")
            self._at_start = False
            return [Delta("text", text)] if text else []
        text = self._held + text
        self._held = "\n" if text.endswith("\n") else ""
        text = text.removesuffix("\n")
        return [Delta("reasoning", text)] if text else []
