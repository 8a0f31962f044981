r"""The grammar that an answer must keep: formats and tool calls in the model's protocol, as GBNF.

    root  := \n? (format | "<tool_call>" calls)      holds from </think> on; without thinking from the start, and no \n
    calls := call (\n? "<tool_call>" call)* \n?      holds from the token <tool_call> on
    call  := "\n<function=" NAME ">\n" parameters "</function>\n" "</tool_call>"
    parameter := "<parameter=" K ">\n" VALUE "\n" "</parameter>\n"?

Where a tool may but need not be called, thinking and text are free until the token <tool_call> comes. tools.py reads
what this grammar allows to the same end: a free text has no line `</parameter>` before a line that starts with
`<parameter=` or `</function>`, and does not start with one. `</parameter>` may be forgotten, as models do, but for
functions that take parameters without a name in the schema; where tools.py would take it for forgotten, a text ends
here too. Up to ORDER parameters may come in any order; more have the
schema's order, because the orders are 2^n rules. Only parameters that the schema does not list may come twice.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence

from stepgguf.chat.output import Markers
from stepgguf.chat.request import Choice, Format, Gbnf, JsonObject, JsonSchema, Tool, ToolChoice
from stepgguf.chat.tools import FORGOTTEN_ENDS, VALUE_ENDS, parameter_names
from stepgguf.errors import BadGrammar
from stepgguf.grammar import ambiguity
from stepgguf.grammar.gbnf import MAX_TEXT, Rules, all_but, char_class, characters, literal
from stepgguf.grammar.json_rules import SchemaRules, define_json
from stepgguf.grammar.schema import MAX_DEPTH, Merged, Node, too_large
from stepgguf.runtime.engine import Grammar

ORDER = 5
_MAX_NAMES = 1024  # characters of parameter names in the rule `text`, each of which makes a rule
_ENDING = re.compile(r"</parameter>|^<parameter=|^</function>", re.MULTILINE)  # what may end a value
_MAX_GROUPS = 64  # in each other, in a grammar of the user's: llama.cpp's parser recurses on its C stack
_PYTHON = {"boolean": ('"True"', '"False"'), "null": ('"None"',)}  # how the template writes them in the history
# strings, classes, tokens, counts and comments of GBNF, closed or not; and outside of them names and groups
_GBNF = re.compile(
    r'"(?:\\.|[^"\\])*"?|\[(?:\\.|[^\]\\])*\]?|<[^>\n]*>?|\{[^}\n]*\}?|#[^\n]*|(?P<name>[a-zA-Z0-9-]+)|(?P<group>[()])',
    re.DOTALL,
)


def constrain(
    markers: Markers,
    *,
    in_reasoning: bool,
    format: Format | None,
    tools: Sequence[Tool],
    choice: ToolChoice,
    parallel: bool,
) -> Grammar | None:
    """What the model may write; None: anything. BadGrammar: not with this format, these tools, or this model."""
    able = markers.call is not None and markers.end_of_call is not None
    offered = [(i, tool) for i, tool in enumerate(tools) if choice.name in (None, tool.name)]
    required = choice.mode == "required"
    if required and not (offered and able):
        raise BadGrammar(
            f"{choice.name or 'a tool'} must be called, but " + ("this model cannot" if offered else "was not offered"),
            param="tool_choice",
            hint='Offer it in `tools`, or set tool_choice to "auto".',
        )
    rules = Rules("response_format")
    define_json(rules)
    options, own_rules, starts = [], "", []
    if format is not None and not required:
        symbol, own_rules = _format(format, rules)
        options.append(symbol)
    if offered and able and choice.mode != "none":
        _define_calls(rules, offered, markers, parallel)
        starts.append((markers.call, "calls"))
    if options or required:
        options += [f"<[{call}]> {name}" for call, name in starts]
        line_break = '"\\n"? ' if in_reasoning else ""  # the one after </think>
        rules.define("root", f"{line_break}({' | '.join(options)})")
        starts = [(markers.end_of_reasoning, "root"), *starts] if in_reasoning else []
    elif not starts:
        return None
    return Grammar(rules.text() + own_rules, tuple((token, name) for token, name in starts if token is not None))


# formats -------------------------------------------------------------------------------------------------------------


def _format(format: Format, rules: Rules) -> tuple[str, str]:
    """One symbol, and the rules of the user's own grammar."""
    if isinstance(format, JsonObject):
        return "object", ""
    if isinstance(format, JsonSchema):
        return SchemaRules(format.schema, rules, strict=True).root(), ""
    if isinstance(format, Choice):
        if not format.texts:
            raise BadGrammar(f"{rules.param} is a choice of nothing", param=rules.param, hint="Give at least one text.")
        return rules.choice(format.texts), ""
    return "u-root", _own_names(format, rules.param)


def _own_names(format: Gbnf, param: str) -> str:
    """A user's grammar with "u-" before all names, so that none of them is one of ours."""
    depth = deepest = 0
    names = set()

    def rename(match: re.Match[str]) -> str:
        nonlocal depth, deepest
        if match["group"]:
            depth += 1 if match["group"] == "(" else -1
            deepest = max(deepest, depth)
        if not match["name"]:
            return match[0]
        names.add(match[0])
        return f"u-{match[0]}"

    problem = ""
    if len(format.text) > MAX_TEXT or re.search("[\0\ud800-\udfff]", format.text):
        problem = f"is longer than {MAX_TEXT} characters or is no text"
    text = "" if problem else _GBNF.sub(rename, format.text)
    if not problem and ("root" not in names or deepest > _MAX_GROUPS):
        problem = f"has no rule `root`, or more than {_MAX_GROUPS} groups in each other"
    problem = problem or ambiguity.problem(format.text) or ""
    if problem:
        raise BadGrammar(f"{param}: the grammar {problem}", param=param, hint="See llama.cpp's grammars/README.md.")
    return text + "\n"


# calls ---------------------------------------------------------------------------------------------------------------


def _define_calls(rules: Rules, tools: Sequence[tuple[int, Tool]], markers: Markers, parallel: bool) -> None:
    names = sorted(frozenset[str]().union(*(parameter_names(tool.parameters) for _, tool in tools)))
    _define_text(rules, names)
    functions = []
    for i, tool in tools:
        _check_name(tool.name, f"tools[{i}].function.name")
        rules.param = f"tools[{i}].function.parameters"
        schema = SchemaRules(tool.parameters, rules, strict=False)
        functions.append(f'{literal(tool.name)} ">\\n" {schema.checked(_CallRules(schema).arguments)}')
    rules.define("call", f'"\\n<function=" ({" | ".join(functions)}) "</function>\\n" <[{markers.end_of_call}]>')
    rules.define("calls", f'call ("\\n"? <[{markers.call}]> call)* "\\n"?' if parallel else 'call "\\n"?')


def _check_name(name: str, param: str) -> None:
    if ">" in name or "\n" in name:
        raise BadGrammar(
            f"{param}: the name {name!r} cannot be written in the model's protocol",
            param=param,
            hint='Use a name without ">" and line breaks.',
        )


def _define_text(rules: Rules, parameters: Sequence[str]) -> None:
    """The rule `text`, any text that tools.py does not end early: one rule per proper prefix of an end.

    It starts as if after a line break, because the one before it may begin an end. With very many parameters no line of
    it starts with `<parameter=`, whatever follows.
    """
    tags = [f"{name}>" for name in parameters] if sum(map(len, parameters)) <= _MAX_NAMES else [""]
    ends = {*VALUE_ENDS, *FORGOTTEN_ENDS, *(f"\n<parameter={tag}" for tag in tags)}
    names = {"": "text-0"}
    for end in sorted(ends):
        for n in range(1, len(end)):
            names.setdefault(end[:n], f"text-{len(names)}")
    alphabet = sorted(set("".join(ends)))
    for prefix, name in names.items():
        options, known = ['""'], ""
        for char in alphabet:
            read = prefix + char
            while read and read not in names and read not in ends:
                _, line_break, rest = read[1:].partition("\n")  # every end starts with one
                read = line_break + rest
            if read:
                known += char
            if read and read not in ends:
                options.append(f"{literal(char)} {names[read]}")
        others = char_class(all_but(characters(known)))
        rules.define(name, " | ".join([*options, f"{others} {names['']}"]))
    rules.define("text", names["\n"])


class _CallRules:
    """The rules for the parameters of one function."""

    def __init__(self, schema: SchemaRules) -> None:
        self._schema = schema
        self._rules = schema.rules
        self._merger = schema.merger

    def arguments(self) -> str | None:
        symbols = [self._parameters(m) for m in self._merged(((self._merger.root, "#"),), frozenset(), 0)]
        return self._rules.either(symbol for symbol in symbols if symbol) if any(symbols) else None

    def _merged(self, node: Node, chosen: frozenset[int], depth: int) -> Iterator[Merged]:
        """The schemas that a node stands for, without anyOf."""
        if depth > MAX_DEPTH:
            raise too_large(self._rules.param, f"nests more than {MAX_DEPTH} schemas")
        merged = self._merger.merge(node, chosen)
        if merged.unions and not merged.never:
            for branch, left in self._schema.branches(merged, node, chosen):
                yield from self._merged(branch, left, depth + 1)
        elif not merged.never:
            yield merged

    def _parameters(self, merged: Merged) -> str | None:
        members = []
        extras = merged.extras()
        close = '"</parameter>\\n"' + ("" if extras else "?")
        for name, node, required in merged.properties():
            _check_name(name, self._rules.param)
            self._merger.charge(len(merged.objects))
            value = self._value(node)
            if value is None and required:
                return None
            if value is not None:
                members.append((self._member(literal(name), value, close), required))
        rest = '""'
        if extras and (value := self._value(extras)):
            names = [tuple(name) for name, _, _ in merged.properties()]
            rest = self._rules.repeat(self._member(self._rules.others(names, ">\n"), value, close), 0)
        if len(members) > ORDER:
            return self._rules.add(" ".join([*(m if required else f"{m}?" for m, required in members), rest]))
        return self._any_order(members, rest)

    def _member(self, name: str, value: str, close: str) -> str:
        return self._rules.add(f'"<parameter=" {name} ">\\n" {value} "\\n" {close}')

    def _any_order(self, members: Sequence[tuple[str, bool]], rest: str) -> str:
        """One rule for each set of members that are left, a bit for each member."""
        left: list[str] = []
        for bits in range(1 << len(members)):
            those = [(i, *member) for i, member in enumerate(members) if bits >> i & 1]
            options = [f"{member} {left[bits - (1 << i)]}" for i, member, _ in those]
            if not any(required for _, _, required in those):
                options.append(rest)
            left.append(self._rules.either(options))
        return left[-1]

    def _value(self, node: Node) -> str | None:
        """A parameter's text: as it is for strings, JSON for the rest."""
        options: list[str] = []
        for merged in self._merged(self._merger.plain_reference(node), frozenset(), 0):
            options += self._values(merged)
        return None if not options else "text" if "text" in options else self._rules.either(options)

    def _values(self, merged: Merged) -> list[str]:
        if merged.enum is not None:
            return [self._literal(member) for member in self._schema.members(merged)]
        types = merged.allowed()
        if "string" in types:
            return ["text"]
        symbol = self._schema.typed(merged)
        python = [text for name, texts in _PYTHON.items() if name in types for text in texts]
        return [*([symbol] if symbol else []), *python]

    def _literal(self, member: object) -> str:
        if isinstance(member, str):
            return "text" if _ENDING.search(member) else literal(member)
        python = f" | {literal(str(member))}" if member is None or isinstance(member, bool) else ""
        return self._rules.add(literal(json.dumps(member, ensure_ascii=False)) + python)
