"""The process that runs a chat template: `main`, started by template.py.

    {"source": TEMPLATE} -> {"text": ""}        first line: it compiles
    {"messages": ...}    -> {"text": PROMPT}    each further line: the variables to render it with
                         -> {"error": WHY}      either

A template is code from a file that somebody else wrote. jinja2's immutable sandbox keeps it in: no attribute that
starts with an underscore, no method that changes its object. It does not keep it short: one filter, one operator or one
pair of loops can run for years or fill the memory, within a single call that nothing in Python interrupts. The limits
of a process hold for all of that, so each template has one: it ends there when a rendering takes too much processor
time, and finds no more memory than it may use.

Rendering follows transformers' conventions (trim_blocks, lstrip_blocks, tojson without ASCII escapes, break and
continue, {% generation %}, strftime_now, raise_exception), which the published templates rely on.
"""

from __future__ import annotations

import contextlib
import json
import resource
import sys
import time
from collections.abc import Mapping
from datetime import datetime
from typing import NoReturn

import jinja2
from jinja2.ext import Extension
from jinja2.nodes import Node, Scope
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

PROCESSOR_SECONDS = 3  # for one rendering; a conversation of 2,000 messages takes 0.15
MEMORY = 1 << 30  # bytes
MAX_TEXT = 1 << 25  # characters; a full context has a million
_MAX_ERROR = 400  # characters of an error, which may quote the template's own text


def main() -> None:
    """Answer line by line, until stdin ends."""
    _limit(resource.RLIMIT_AS, MEMORY)
    _limit(resource.RLIMIT_CORE, 0)
    template: jinja2.Template | None = None
    # the limits hold for compiling too: jinja2 computes constant expressions then
    for line in sys.stdin.buffer:
        _limit(resource.RLIMIT_CPU, int(time.process_time()) + PROCESSOR_SECONDS)
        try:
            asked = json.loads(line)
            if template is None:
                template, text = template_environment().from_string(asked["source"]), ""
            else:
                text = _render(template, asked)
            answer = {"text": text}
        except MemoryError:
            answer = {"error": f"it needs more than {MEMORY >> 20} MiB of memory"}
        except Exception as error:  # noqa: BLE001  a template can raise anything; this is where it ends
            answer = {"error": (str(error) or type(error).__name__)[:_MAX_ERROR]}
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()


def template_environment() -> jinja2.Environment:
    """Return jinja2 as transformers sets it up, and with the filter `fromjson`, which the template of 3.7 needs."""
    jinja = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationTag]
    )
    jinja.filters["tojson"] = _to_json  # jinja2's own escapes HTML, and sorts keys
    jinja.filters["fromjson"] = json.loads
    jinja.globals["raise_exception"] = _raise_exception
    jinja.globals["strftime_now"] = lambda form: datetime.now().strftime(form)  # local time, as in transformers
    return jinja


class _GenerationTag(Extension):
    """{% generation %} marks what the model wrote, for training; here it is only a block."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        return Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


def _render(template: jinja2.Template, variables: Mapping[str, object]) -> str:
    pieces, n = [], 0
    for piece in template.generate(**variables):
        pieces.append(piece)
        n += len(piece)
        if n > MAX_TEXT:
            raise ValueError(f"it writes more than {MAX_TEXT:,} characters")
    return "".join(pieces)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _limit(which: int, most: int) -> None:
    """Set a limit of this process where the system lets us: macOS knows none for memory."""
    hard = resource.getrlimit(which)[1]
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(which, (most, hard))
