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
from collections.abc import Callable, Mapping

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
_PYTHON_LITERALS = {"True": "true", "False": "false", "None": "null"}  # how the template writes them in the history


def _any_beginning(*atoms: str) -> str:
    """A pattern of every beginning of what these patterns match one after the other."""
    pattern = ""
    for atom in reversed(atoms):
        pattern = f"(?:{atom}{pattern})?"
    return pattern


_MAY_END = re.compile(
    "|".join(
        _any_beginning(*start, *tag)
        for start in (("\n?", *"</parameter>", "\n*"), ("\n",))
        for tag in ((*"<parameter=", r"[^>\n]*"), (*"</function>", "\n?"))
    )
)


class CallReader:
    """Feed it the text, then finish it. Both return the next fragment of the arguments' JSON, `name` being set before.

    problem: why this is no call, or no longer one. Then the arguments are complete JSON as far as they came, `rest` is
    the text that was not read (all of it if `name` is None), and feeding is over.

        function --<function=NAME>--> body --<parameter=K>--> value --its end--> body --</function>--> end
    """

    def __init__(self, tools: Mapping[str, Tool]) -> None:
        self.name: str | None = None
        self.problem: str | None = None
        self.rest = ""
        self.warnings: list[str] = []
        self._tools = tools
        self._read: Callable[[], bool] = self._read_function  # the state
        self._out: list[str] = []  # fragments of JSON that nobody has had yet
        self._late = ""  # comes with the next fragment: a call may be cut before it
        self._keys: dict[str, None] = {}  # the parameters that the call has had, in their order
        self._value: _ParameterValue | None = None

    @property
    def in_value(self) -> bool:
        """Whether a parameter's value is under way, of which anything but its end is a part."""
        return self._value is not None

    @property
    def has_ended(self) -> bool:
        """Whether </function> has come."""
        return self._read == self._read_end

    def feed(self, text: str) -> str:
        """Read more of the call's text."""
        self.rest += text
        while self._read():
            pass
        return self._take_output()

    def try_end(self) -> bool:
        """Whether the call can be taken for whole if its text ends here. It ends a value whose end was forgotten."""
        if self.name is None or self.has_ended:
            return self.has_ended
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
        """Take the text for over, which is not within a value; what is missing then becomes the `problem`."""
        assert self._value is None
        if self.has_ended:
            self._emit("}")
        elif self._read == self._read_function:
            self._set_problem("has no <function=NAME>")
        elif self._read == self._read_body:
            self._set_problem("has no </function>")
        return self._take_output()

    def cut_off(self) -> str:
        """Take the text for over and the call for unfinished: the JSON stays an unclosed prefix."""
        self._emit("")
        return self._take_output()

    def _emit(self, fragment: str) -> None:
        """Add JSON, after what was held back until more of the call came."""
        self._out.append(self._late + fragment)
        self._late = ""

    def _take_output(self) -> str:
        fragment, self._out = "".join(self._out), []
        return fragment

    def _set_problem(self, problem: str) -> bool:
        self.problem = problem
        if self.name is not None:
            self._emit("}")
        self._read = self._read_nothing
        return False

    # states: each reads what it can of `rest` and says whether it changed the state ----------------------------------

    def _read_function(self) -> bool:
        match = _FUNCTION.match(self.rest)
        if match is None:
            return self._wait_for(("<function=",), "does not start with <function=NAME>")
        if match[1] not in self._tools:
            return self._set_problem(f"names the function {match[1]!r}, which was not offered")
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
        # All but what may still become the end goes out now: it is kept from its first character on.
        cut = next(
            (m.start() for m in re.finditer("[\n<]", self.rest) if _MAY_END.fullmatch(self.rest, m.start())), None
        )
        self._emit(self._value.feed(self.rest[:cut]))
        self.rest = "" if cut is None else self.rest[cut:]
        return False

    def _read_end(self) -> bool:
        return bool(self.rest.strip()) and self._set_problem("goes on after </function>")

    def _read_nothing(self) -> bool:
        return False

    def _wait_for(self, tags: tuple[str, ...], problem: str) -> bool:
        """Read nothing yet, if the text can still become one of the tags."""
        text = self.rest.lstrip()
        if "\n" not in text and any(tag.startswith(text[: len(tag)]) for tag in tags):
            return False
        return self._set_problem(problem)

    @property
    def _parameters(self) -> Mapping[str, object]:
        assert self.name is not None
        return self._tools[self.name].parameters

    def _start_value(self, key: str) -> None:
        if key in self._keys:  # JSON has no way to say it twice, and the first one is out already
            self.warnings.append(f"the call of {self.name} has {key!r} twice; the first one counts")
            self._value = _ParameterValue(None)
            return
        self._emit(("," if self._keys else "") + json.dumps(key, ensure_ascii=False) + ":")
        self._keys[key] = None
        self._value = _ParameterValue(parameter_types(self._parameters, key))

    def _end_value(self, text: str, *, forgotten: bool) -> None:
        assert self._value is not None
        if forgotten:
            self.warnings.append(f"the call of {self.name} lacks a tag after its parameter {list(self._keys)[-1]!r}")
        self._emit(self._value.feed(text))
        self._late = self._value.finish()  # if generation is cut right here, the JSON must not look whole
        if self._value.misfit:
            self.warnings.append(f"a parameter of {self.name} is {self._value.misfit}")
        self._value = None


class _ParameterValue:
    """Turns one parameter's text into JSON. types: what it may be; None: it is read and ignored.

    A value that can only be a string goes out as it comes, any other at its end: "tru" may become true or "trunk".
    """

    def __init__(self, types: frozenset[str] | None) -> None:
        self.misfit = ""
        self._types = types
        self._streams = types == frozenset({"string"})
        self._kept: list[str] = []
        self._started = False

    def feed(self, text: str) -> str:
        """Return the JSON of more of the text: nothing, unless it can only be a string."""
        if text and not self._started:
            self._started = True
            text = text.removeprefix("\n")
            if self._streams:
                return '"' + _escape_json(text)
        if self._streams:
            return _escape_json(text)
        self._kept.append(text)
        return ""

    def finish(self) -> str:
        """Return the rest of the JSON; `misfit` says what is wrong with it."""
        if self._streams:
            return '"' if self._started else '""'
        if self._types is None:
            return ""
        text, self.misfit = value_as_json("".join(self._kept), self._types)
        return text


def value_as_json(text: str, types: frozenset[str]) -> tuple[str, str]:
    """Return a value's text as JSON of one of these types, and what is wrong with it ("" if nothing is).

    JSON wins over text where both are allowed ("5" is the number if there may be one; models do not quote strings).
    Text that may not be a string is one all the same if it is no JSON: better than nothing.
    """
    stripped = text.strip()
    stripped = _PYTHON_LITERALS.get(stripped, stripped)
    try:
        found = type_of(json.loads(stripped, parse_constant=_refuse_constant))
    except (ValueError, RecursionError):
        found = ""
    if found and found != "string" and found in widen_types(types):
        return stripped, ""
    expected = " or ".join(sorted(types))
    if found and "string" not in types:
        return stripped, f"{found}, not {expected}"
    return json.dumps(text, ensure_ascii=False), "" if "string" in types else f"no JSON, but should be {expected}"


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _escape_json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]
