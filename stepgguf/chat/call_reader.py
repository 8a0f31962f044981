r"""The text of one tool call, read while it arrives, as a function's name and the JSON of its arguments.

    call  := \s* "<function=" NAME ">" (\s* value)* \s* "</function>" \s*
    value := "<parameter=" K ">" \n? TEXT \n "</parameter>" \n

A value ends at the first line `</parameter>` that is followed by a line starting with `<parameter=` or `</function>`.
The protocol has no escapes, and agents write files: a `</parameter>` within a line, or on a line of its own before
anything else, and the tokens <tool_call> and </tool_call> are part of the value. Only a value that quotes this very
protocol at the start of its lines cannot be told from the protocol. call_grammar.py forbids the model just that.

Models forget `</parameter>`, or put it at the end of a line. So a value also ends, with a warning, before a line that
starts with `<parameter=K>`, if K is a parameter of the function that the call has not had; and, if no required
parameter is missing then, before a line `</function>` or `</parameter>` with the token </tool_call> after it.

A parameter that can only be a string is passed on, JSON-escaped, as it arrives; for any other the text is kept to its
end and then becomes JSON by its schema. The JSON is closed when the call is known to be whole: what ends before that is
an unclosed prefix of it, which nobody can take for a call. Text that is not a call stays in `rest`, and `problem` says
why: nothing is dropped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from stepgguf.chat.parameter_types import parameter_names, parameter_types, required_names
from stepgguf.chat.request import Tool
from stepgguf.grammar.merged_schema import type_of, widen_types

VALUE_ENDS = ("\n</parameter>\n<parameter=", "\n</parameter>\n</function>")
FORGOTTEN_ENDS = tuple(f"\n{tag}{space}</tool_call>" for tag in ("</function>", "</parameter>") for space in ("\n", ""))
_END = re.compile(r"\n</parameter>\n(?=<parameter=|</function>)|(?:\n?</parameter>\n+|\n)<parameter=(?P<key>[^>\n]*)>")
_FORGOTTEN_END = re.compile(r"(?:\n?</parameter>\n+|\n)</function>\n?|\n</parameter>\n?")
_FUNCTION = re.compile(r"\s*<function=([^>\n]*)>")
_PARAMETER = re.compile(r"\s*<parameter=([^>\n]*)>")
_CLOSE = re.compile(r"\s*</function>")
PYTHON_LITERALS = {"True": "true", "False": "false", "None": "null"}  # how the template writes them in the history


def _begun(*atoms: str) -> str:
    """A pattern of every beginning of what these patterns match one after the other."""
    pattern = ""
    for atom in reversed(atoms):
        pattern = f"(?:{atom}{pattern})?"
    return pattern


_MAY_END = re.compile(
    "|".join(
        _begun(*start, *tag)
        for start in (("\n?", *"</parameter>", "\n*"), ("\n",))
        for tag in ((*"<parameter=", r"[^>\n]*"), (*"</function>", "\n?"))
    )
)


class CallReader:
    """feed the text, then finish. Both return the next fragment of the arguments' JSON; `name` is set before the first.

    problem: why this is no call, or no longer one. Then the arguments are complete JSON as far as they came, `rest` is
    the text that was not read (all of it if `name` is None), and feeding is over.
    """

    def __init__(self, tools: Mapping[str, Tool]) -> None:
        self.name: str | None = None
        self.problem: str | None = None
        self.rest = ""
        self.warnings: list[str] = []
        self._tools = tools
        self._read: Callable[[], bool] = self._read_function
        self._out: list[str] = []
        self._late = ""  # comes with the next fragment: a call may be cut before it
        self._keys: dict[str, None] = {}
        self._value: _Value | None = None

    @property
    def in_value(self) -> bool:
        return self._value is not None

    @property
    def ended(self) -> bool:
        return self._read == self._read_end

    def feed(self, text: str) -> str:
        self.rest += text
        while self._read():
            pass
        return self._taken()

    def try_end(self) -> bool:
        """Whether the call can be taken for whole if its text ends here. It ends a value whose end was forgotten."""
        if self.name is None or self.ended:
            return self.ended
        if not required_names(self._parameters) <= self._keys.keys():
            return False
        if self._value is None:
            return not self.rest.strip()
        forgotten = _FORGOTTEN_END.fullmatch(self.rest)
        if forgotten is None:
            return False
        self._end_value("", forgotten=True)
        self.rest, self._read = "", self._read_end
        return True

    def finish(self) -> str:
        """The text is over, and not within a value."""
        assert self._value is None
        if self.ended:
            self._put("}")
        elif self._read == self._read_function:
            self._fail("has no <function=NAME>")
        elif self._read == self._read_body:
            self._fail("has no </function>")
        return self._taken()

    def cut(self) -> str:
        """The text is over, and the call is not: the last fragment of an unclosed prefix."""
        self._put("")
        return self._taken()

    def _put(self, fragment: str) -> None:
        self._out.append(self._late + fragment)
        self._late = ""

    def _taken(self) -> str:
        fragment, self._out = "".join(self._out), []
        return fragment

    def _fail(self, problem: str) -> bool:
        self.problem = problem
        if self.name is not None:
            self._put("}")
        self._read = self._read_nothing
        return False

    # states: each reads what it can of `rest` and says whether it changed the state ----------------------------------

    def _read_function(self) -> bool:
        match = _FUNCTION.match(self.rest)
        if match is None:
            return self._wait_for(("<function=",), "does not start with <function=NAME>")
        if match[1] not in self._tools:
            return self._fail(f"names the function {match[1]!r}, which was not offered")
        self.name = match[1]
        self._late = "{"
        self.rest = self.rest[match.end() :]
        self._read = self._read_body
        return True

    def _read_body(self) -> bool:
        if match := _PARAMETER.match(self.rest):
            self._start_value(match[1])
            self._read = self._read_value
        elif match := _CLOSE.match(self.rest):
            self._read = self._read_end
        else:
            return self._wait_for(("<parameter=", "</function>"), "has text outside of its parameters")
        self.rest = self.rest[match.end() :]
        return True

    def _read_value(self) -> bool:
        assert self._value is not None
        for match in _END.finditer(self.rest):
            key = match["key"]
            if key is None or (key in parameter_names(self._parameters) and key not in self._keys):
                self._end_value(self.rest[: match.start()], forgotten=key is not None)
                self.rest = self.rest[match.end() :]
                if key is None:
                    self._read = self._read_body
                else:
                    self._start_value(key)
                return True
        cut = next(
            (m.start() for m in re.finditer("[\n<]", self.rest) if _MAY_END.fullmatch(self.rest, m.start())), None
        )
        self._put(self._value.feed(self.rest[:cut]))
        self.rest = "" if cut is None else self.rest[cut:]
        return False

    def _read_end(self) -> bool:
        return bool(self.rest.strip()) and self._fail("goes on after </function>")

    def _read_nothing(self) -> bool:
        return False

    def _wait_for(self, tags: tuple[str, ...], problem: str) -> bool:
        """Read nothing yet, if the text can still become one of the tags."""
        text = self.rest.lstrip()
        if "\n" not in text and any(tag.startswith(text[: len(tag)]) for tag in tags):
            return False
        return self._fail(problem)

    @property
    def _parameters(self) -> Mapping[str, Any]:
        assert self.name is not None
        return self._tools[self.name].parameters

    def _start_value(self, key: str) -> None:
        if key in self._keys:
            self.warnings.append(f"the call of {self.name} has {key!r} twice; the first one counts")
            self._value = _Value(None)
            return
        self._put(("," if self._keys else "") + json.dumps(key, ensure_ascii=False) + ":")
        self._keys[key] = None
        self._value = _Value(parameter_types(self._parameters, key))

    def _end_value(self, text: str, *, forgotten: bool) -> None:
        assert self._value is not None
        if forgotten:
            self.warnings.append(f"the call of {self.name} lacks a tag after its parameter {list(self._keys)[-1]!r}")
        self._put(self._value.feed(text))
        self._late = self._value.finish()
        if self._value.misfit:
            self.warnings.append(f"a parameter of {self.name} is {self._value.misfit}")
        self._value = None


class _Value:
    """One parameter's text as JSON. types: what it may be; None: it is read and ignored."""

    def __init__(self, types: frozenset[str] | None) -> None:
        self.misfit = ""
        self._types = types
        self._streams = types == frozenset({"string"})
        self._kept: list[str] = []
        self._started = False

    def feed(self, text: str) -> str:
        if text and not self._started:
            self._started = True
            text = text.removeprefix("\n")
            if self._streams:
                return '"' + _escaped(text)
        if self._streams:
            return _escaped(text)
        self._kept.append(text)
        return ""

    def finish(self) -> str:
        if self._streams:
            return '"' if self._started else '""'
        if self._types is None:
            return ""
        text, self.misfit = as_json("".join(self._kept), self._types)
        return text


def as_json(text: str, types: frozenset[str]) -> tuple[str, str]:
    """A value's text as JSON of one of these types, and what is wrong with it.

    JSON wins over text where both are allowed ("5" is the number if there may be one; models do not quote strings).
    Text that may not be a string is one all the same if it is no JSON: better than nothing.
    """
    stripped = text.strip()
    stripped = PYTHON_LITERALS.get(stripped, stripped)
    try:
        found = type_of(json.loads(stripped, parse_constant=_refuse))
    except (ValueError, RecursionError):
        found = ""
    if found and found != "string" and found in widen_types(types):
        return stripped, ""
    expected = " or ".join(sorted(types))
    if found and "string" not in types:
        return stripped, f"{found}, not {expected}"
    return json.dumps(text, ensure_ascii=False), "" if "string" in types else f"no JSON, but should be {expected}"


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def held_from(text: str, ends: Iterable[str]) -> int:
    """Where a suffix of text begins that may become one of `ends`; the length of text if there is none."""
    ends = tuple(ends)
    longest = max(map(len, ends), default=0)
    for i in range(max(0, len(text) - longest + 1), len(text)):
        if any(end.startswith(text[i:]) for end in ends):
            return i
    return len(text)
