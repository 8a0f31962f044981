r"""Tool calls in the model's protocol, as GBNF.

    calls := call (\n? "<tool_call>" call)* \n?      holds from the token <tool_call> on
    call  := "\n<function=" NAME ">\n" parameters "</function>\n" "</tool_call>"
    parameter := "<parameter=" K ">\n" VALUE "\n" "</parameter>\n"?

call_reader.py reads what this grammar allows to the same end: a free text has no line `</parameter>` before a line that
starts with `<parameter=` or `</function>`, and does not start with one. `</parameter>` may be forgotten, as models do,
but for functions that take parameters without a name in the schema; where call_reader.py would take it for forgotten, a
text ends here too. Up to ORDER parameters may come in any order; more have the schema's order, because the orders are
2^n rules. Only parameters that the schema does not list may come twice.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence

from stepgguf.chat.call_reader import FORGOTTEN_ENDS, VALUE_ENDS
from stepgguf.chat.output import Markers
from stepgguf.chat.parameter_types import parameter_names
from stepgguf.chat.request import Tool
from stepgguf.errors import BadGrammar
from stepgguf.grammar.gbnf import GrammarRules, all_but, char_class, character_ranges, literal
from stepgguf.grammar.merged_schema import MergedSchema, Node
from stepgguf.grammar.schema import MAX_DEPTH, too_large
from stepgguf.grammar.schema_rules import SchemaRules

ORDER = 5
_MAX_NAMES = 1024  # characters of parameter names in the rule `text`, each of which makes a rule
_ENDING = re.compile(r"</parameter>|^<parameter=|^</function>", re.MULTILINE)  # what may end a value
_PYTHON = {"boolean": ('"True"', '"False"'), "null": ('"None"',)}  # how the template writes them in the history


def define_calls(rules: GrammarRules, tools: Sequence[tuple[int, Tool]], markers: Markers, parallel: bool) -> None:
    """Add the rule `calls` for these tools, each with its index in the request, for the errors."""
    names = sorted(frozenset[str]().union(*(parameter_names(tool.parameters) for _, tool in tools)))
    _define_text(rules, names)
    functions = []
    for i, tool in tools:
        _check_name(tool.name, f"tools[{i}].function.name")
        rules.param = f"tools[{i}].function.parameters"
        schema = SchemaRules(tool.parameters, rules, strict=False)
        functions.append(f'{literal(tool.name)} ">\\n" {schema.checked_symbol(_CallRules(schema).arguments_symbol)}')
    rules.define_rule("call", f'"\\n<function=" ({" | ".join(functions)}) "</function>\\n" <[{markers.end_of_call}]>')
    rules.define_rule("calls", f'call ("\\n"? <[{markers.call}]> call)* "\\n"?' if parallel else 'call "\\n"?')


def _check_name(name: str, param: str) -> None:
    if ">" in name or "\n" in name:
        raise BadGrammar(
            f"{param}: the name {name!r} cannot be written in the model's protocol",
            param=param,
            hint='Use a name without ">" and line breaks.',
        )


def _define_text(rules: GrammarRules, parameters: Sequence[str]) -> None:
    """Add the rule `text`, any text that call_reader.py does not end early: one rule per proper prefix of an end.

    That is the automaton of a search for all ends at once: a rule knows which prefix of an end was just written, and
    has no way to complete one. It starts as if after a line break, because the one before it may begin an end. With
    very many parameters no line of it starts with `<parameter=`, whatever follows.
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
                # the longest suffix that begins an end: every end starts with a line break, so look for the next one
                _, line_break, rest = read[1:].partition("\n")
                read = line_break + rest
            if read:
                known += char
            if read and read not in ends:
                options.append(f"{literal(char)} {names[read]}")
        others = char_class(all_but(character_ranges(known)))
        rules.define_rule(name, " | ".join([*options, f"{others} {names['']}"]))
    rules.define_rule("text", names["\n"])


class _CallRules:
    """Adds the rules for the parameters of one function."""

    def __init__(self, schema: SchemaRules) -> None:
        self._schema = schema
        self._rules = schema.rules
        self._merger = schema.merger

    def arguments_symbol(self) -> str | None:
        """Return the symbol for all parameters of a call, one after the other; None if no call fits the schema."""
        symbols = [self._parameter_list(m) for m in self._without_unions(((self._merger.root, "#"),), frozenset(), 0)]
        return self._rules.either_of(symbol for symbol in symbols if symbol) if any(symbols) else None

    def _without_unions(self, node: Node, chosen: frozenset[int], depth: int) -> Iterator[MergedSchema]:
        """The schemas that a node stands for, without anyOf."""
        if depth > MAX_DEPTH:
            raise too_large(self._rules.param, f"nests more than {MAX_DEPTH} schemas")
        merged = self._merger.merge(node, chosen)
        if merged.unions and not merged.never:
            for branch, left in self._schema.union_branches(merged, node, chosen):
                yield from self._without_unions(branch, left, depth + 1)
        elif not merged.never:
            yield merged

    def _parameter_list(self, merged: MergedSchema) -> str | None:
        members = []
        extras = merged.extra_properties()
        # Where any name may come next, a text that quotes `<parameter=` could not be told from a forgotten end.
        close = '"</parameter>\\n"' + ("" if extras else "?")
        for name, node, required in merged.properties():
            _check_name(name, self._rules.param)
            self._merger.count_visits(len(merged.objects))
            value = self._value_symbol(node)
            if value is None and required:
                return None
            if value is not None:
                members.append((self._parameter(literal(name), value, close), required))
        rest = '""'
        if extras and (value := self._value_symbol(extras)):
            names = [tuple(name) for name, _, _ in merged.properties()]
            rest = self._rules.repeat_symbol(self._parameter(self._rules.any_text_but(names, ">\n"), value, close), 0)
        if len(members) > ORDER:
            return self._rules.symbol_for(" ".join([*(m if required else f"{m}?" for m, required in members), rest]))
        return self._any_order(members, rest)

    def _parameter(self, name: str, value: str, close: str) -> str:
        return self._rules.symbol_for(f'"<parameter=" {name} ">\\n" {value} "\\n" {close}')

    def _any_order(self, members: Sequence[tuple[str, bool]], rest: str) -> str:
        """One rule for each set of members that are left, a bit for each member."""
        left: list[str] = []
        for bits in range(1 << len(members)):
            those = [(i, *member) for i, member in enumerate(members) if bits >> i & 1]
            options = [f"{member} {left[bits - (1 << i)]}" for i, member, _ in those]
            if not any(required for _, _, required in those):
                options.append(rest)
            left.append(self._rules.either_of(options))
        return left[-1]

    def _value_symbol(self, node: Node) -> str | None:
        """A parameter's text: as it is for strings, JSON for the rest."""
        options: list[str] = []
        for merged in self._without_unions(self._merger.follow_references(node), frozenset(), 0):
            options += self._value_options(merged)
        return None if not options else "text" if "text" in options else self._rules.either_of(options)

    def _value_options(self, merged: MergedSchema) -> list[str]:
        if merged.enum is not None:
            return [self._member_literal(member) for member in self._schema.enum_members(merged)]
        types = merged.allowed_types()
        if "string" in types:
            return ["text"]
        symbol = self._schema.typed_symbol(merged)
        python = [text for name, texts in _PYTHON.items() if name in types for text in texts]
        return [*([symbol] if symbol else []), *python]

    def _member_literal(self, member: object) -> str:
        if isinstance(member, str):
            return "text" if _ENDING.search(member) else literal(member)
        python = f" | {literal(str(member))}" if member is None or isinstance(member, bool) else ""
        return self._rules.symbol_for(literal(json.dumps(member, ensure_ascii=False)) + python)
