"""An answer by script as its writer gets it: tokens as a model would make them, through the real output machine."""

from __future__ import annotations

from stepgguf.chat.exchange import PreparedRequest, Reply
from stepgguf.chat.output import Delta, Markers
from stepgguf.chat.request import Tool
from stepgguf.runtime.engine import Finished, FinishReason, Request, Stream, Timings
from stepgguf.server.dialects.writer import AnswerWriter
from stepgguf.server.generation import AnswerPart
from stepgguf.server.http.sse import JsonEvent
from tests.scripted_engine import ScriptedEngine

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
    timings = Timings(n_prompt=10, n_cached=n_cached, n_generated=len(pieces))
    engine, request = ScriptedEngine(*pieces, Finished(reason, timings)), Request(prompt=(0,) * 10)
    markers = Markers(*map(engine.token_id, ("</think>", "<tool_call>", "</tool_call>")))
    reply = Reply(PreparedRequest(request, markers, True, tools, stops))
    return [delta for event in Stream(engine, request) for delta in reply.feed(event)], reply


def streamed(writer: AnswerWriter, deltas: list[Delta], reply: Reply) -> list[JsonEvent]:
    """What a writer makes of an answer that comes in one part, from start to finish."""
    parts = (writer.start(), writer.feed(AnswerPart(0, deltas, reply.finish_reason)), writer.finish([reply]))
    return [record for part in parts for record in part if isinstance(record, JsonEvent)]
