"""What every client is asked, and whom: the server of tests/server, on the embedded model."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from tests.server.conftest import Server
from tests.server.conftest import chat_model as chat_model
from tests.server.conftest import dying as dying
from tests.server.conftest import serve as serve
from tests.server.conftest import server as server

LETTERS = "How many 'r's are in the word strawberry?"
THINKING = "Looking for r. Spelling it: s, t, r (1), a, w, b, e, r (2), r (3), y. I found it 3 times."
COUNTED = "There are 3 'r's."

WEATHER = "What is the weather in Paris?"
RESULT = json.dumps({"temp_c": 21, "sky": "sunny"})
FORECAST = "It is 21 degrees and sunny in Paris."
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


class Count(BaseModel):
    """How often a letter occurs. Bounded: the embedded model was not trained on JSON and comes to no end by itself."""

    letter: Literal["r", "s"]
    count: Annotated[int, Field(ge=0, le=9)]


def get_weather(city: str) -> str:
    """Get the weather"""
    return RESULT if city == "Paris" else "not known"


def user(content: str) -> Any:
    return {"role": "user", "content": content}


def n_answers(server: Server) -> int:
    """How many answers the model has made so far, as /metrics says."""
    counts = re.findall(r"^stepgguf_answers_total\{.*\} (\S+)$", server.client.get("/metrics").text, re.MULTILINE)
    return int(sum(map(float, counts)))
