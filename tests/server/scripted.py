"""An answer by script: tokens as a model would make them, through the real output machine."""

from __future__ import annotations

from stepgguf.chat.exchange import PreparedRequest, Reply
from stepgguf.chat.output import Delta, Markers
from stepgguf.chat.request import Tool
from stepgguf.runtime.engine import Finished, FinishReason, Request, Step, Timings, Tokens

SPECIAL = {"</think>": 1, "<tool_call>": 2, "</tool_call>": 3}
WEATHER = Tool("get_weather", parameters={"type": "object", "properties": {"city": {"type": "string"}}})
CALL = ["<tool_call>", "\n<function=get_weather>\n", "<parameter=city>\n", "Par", "is", "\n</parameter>\n</function>\n"]


def answer(
    pieces: list[str],
    *,
    reason: FinishReason = "stop",
    stops: tuple[str, ...] = (),
    n_cached: int = 0,
    tools: tuple[Tool, ...] = (WEATHER,),
) -> tuple[list[Delta], Reply]:
    """The deltas of these tokens, and the reply that has read them. The prompt had 10 tokens."""
    markers = Markers(SPECIAL["</think>"], SPECIAL["<tool_call>"], SPECIAL["</tool_call>"])
    reply = Reply(PreparedRequest(Request(prompt=(0,) * 10), markers, True, tools, stops))
    deltas = [
        delta for piece in pieces for delta in reply.feed(Tokens((Step(SPECIAL.get(piece, 100), piece.encode()),)))
    ]
    timings = Timings(n_prompt=10, n_cached=n_cached, n_generated=len(pieces))
    return deltas + reply.feed(Finished(reason, timings)), reply
