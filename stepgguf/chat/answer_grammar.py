r"""The grammar that an answer must keep: a format, tool calls in the model's protocol, or both, as GBNF.

    root  := \n? (format | "<tool_call>" calls)      holds from </think> on; without reasoning from the start, and no \n
    calls := ...                                     holds from the token <tool_call> on; see call_grammar.py

Where a tool may but need not be called, reasoning and text are free until the token <tool_call> comes.
"""

from __future__ import annotations

from collections.abc import Sequence

from stepgguf.chat.call_grammar import define_calls
from stepgguf.chat.output import Markers
from stepgguf.chat.request import AnswerFormat, JsonObject, JsonSchema, OneOfTexts, Tool, ToolChoice
from stepgguf.errors import BadGrammar
from stepgguf.grammar.gbnf import GrammarRules
from stepgguf.grammar.json_grammar import define_json
from stepgguf.grammar.schema_rules import SchemaRules
from stepgguf.grammar.user_grammar import prefix_names
from stepgguf.runtime.engine import Grammar

_USER_PREFIX = "u-"  # before the names of a user's own rules


def constrain_answer(
    markers: Markers,
    *,
    in_reasoning: bool,
    format: AnswerFormat | None,
    tools: Sequence[Tool],
    choice: ToolChoice,
    parallel: bool,
) -> Grammar | None:
    """Return what the model may write; None: anything. BadGrammar: not with this format, these tools, or this model."""
    can_call = markers.call is not None and markers.end_of_call is not None
    offered = [(i, tool) for i, tool in enumerate(tools) if choice.name in (None, tool.name)]
    required = choice.mode == "required"
    if required and not (offered and can_call):
        raise BadGrammar(
            f"{choice.name or 'a tool'} must be called, but " + ("this model cannot" if offered else "was not offered"),
            param="tool_choice",
            hint='Offer it in `tools`, or set tool_choice to "auto".',
        )
    rules = GrammarRules("response_format")
    define_json(rules)
    options, user_rules, starts = [], "", []
    if format is not None and not required:
        symbol, user_rules = _format_symbol(format, rules)
        options.append(symbol)
    if offered and can_call and choice.mode != "none":
        define_calls(rules, offered, markers, parallel)
        starts.append((markers.call, "calls"))
    if options or required:  # the whole answer is constrained, so a call must be spelled out in `root`
        options += [f"<[{call}]> {name}" for call, name in starts]
        line_break = '"\\n"? ' if in_reasoning else ""  # the one after </think>
        rules.define_rule("root", f"{line_break}({' | '.join(options)})")
        starts = [(markers.end_of_reasoning, "root"), *starts] if in_reasoning else []
    elif not starts:
        return None
    return Grammar(rules.gbnf_text() + user_rules, tuple((token, name) for token, name in starts if token is not None))


def _format_symbol(format: AnswerFormat, rules: GrammarRules) -> tuple[str, str]:
    """One symbol, and the rules of the user's own grammar if that is what the format is."""
    if isinstance(format, JsonObject):
        return "object", ""
    if isinstance(format, JsonSchema):
        return SchemaRules(format.schema, rules, strict=True).root_symbol(), ""
    if isinstance(format, OneOfTexts):
        if not format.texts:
            raise BadGrammar(f"{rules.param} is a choice of nothing", param=rules.param, hint="Give at least one text.")
        return rules.one_of_texts(format.texts), ""
    return f"{_USER_PREFIX}root", prefix_names(format.text, _USER_PREFIX, rules.param)
