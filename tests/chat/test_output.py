"""Tokens become reasoning, text and calls, however they are cut, and nothing is lost."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepgguf.chat.exchange import PreparedRequest, Reply
from stepgguf.chat.output import Delta, Markers, OutputMachine
from stepgguf.chat.request import Tool
from stepgguf.runtime.engine import Finished, Request, Step, Timings, Tokens

THINK, END, CALL, END_CALL = 996, 997, 998, 999
MARKERS = Markers(END, CALL, END_CALL, THINK)
SPECIAL = {
    "⟨think⟩": (THINK, b"<think>"),
    "⟨end⟩": (END, b"</think>"),
    "⟨call⟩": (CALL, b"<tool_call>"),
    "⟨/call⟩": (END_CALL, b"</tool_call>"),
}
TOOLS = (
    Tool("write", None, {"type": "object", "properties": {"path": {"type": "string"}, "text": {"type": "string"}}}),
    Tool("add", None, {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": ["number", "null"]}}}),
)
WRITE = "\n<function=write>\n<parameter=path>\na/é.py\n</parameter>\n<parameter=text>\nif 🙂:\n\n    </parameter>\n</parameter>\nx\n\n</parameter>\n</function>\n"  # noqa: E501
WRITTEN = {"path": "a/é.py", "text": "if 🙂:\n\n    </parameter>\n</parameter>\nx\n"}
ADD = "\n<function=add>\n<parameter=a>\n5\n</parameter>\n<parameter=b>\nNone\n</parameter>\n</function>\n"
ADDED = {"a": 5, "b": None}


@dataclass
class Answer:
    machine: OutputMachine
    reasoning: str = ""
    text: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)
    order: str = ""
    steps: list[Step] = field(default_factory=list)
    deltas: list[Delta] = field(default_factory=list)


def steps(script: str, cuts: list[int]) -> list[Step]:
    """A script as tokens: markers are ⟨...⟩, the rest is cut at these bytes."""
    result: list[Step] = []
    for i, part in enumerate(_parts(script)):
        if part in SPECIAL:
            result.append(Step(*SPECIAL[part]))
            continue
        data = part.encode()
        edges = sorted({0, len(data), *((c + i) % (len(data) + 1) for c in cuts)})
        result += [Step(n, data[a:b]) for n, (a, b) in enumerate(pairwise(edges))]
    return result


def _parts(script: str) -> list[str]:
    parts = [script]
    for marker in SPECIAL:
        parts = [p for part in parts for p in _split(part, marker)]
    return [part for part in parts if part]


def _split(part: str, marker: str) -> list[str]:
    if part in SPECIAL:
        return [part]
    pieces = part.split(marker)
    return [p for piece in pieces for p in (marker, piece)][1:]


def run(
    script: str,
    cuts: list[int],
    *,
    in_reasoning: bool = True,
    tools: tuple[Tool, ...] = TOOLS,
    stops: tuple[str, ...] = (),
    cut: bool = False,
) -> Answer:
    machine = OutputMachine(MARKERS, in_reasoning=in_reasoning, tools=tools, stops=stops)
    answer = Answer(machine)
    answer.deltas = [delta for step in steps(script, cuts) for delta in machine.feed(step)] + machine.close(cut=cut)
    for delta in answer.deltas:
        assert delta.text
        add(answer, delta)
    assert len(answer.calls) == machine.n_calls
    for index, (_, arguments) in enumerate(answer.calls):
        if index == machine.cut_call:
            assert arguments.startswith("{")
            with pytest.raises(json.JSONDecodeError):
                json.loads(arguments)
        else:
            json.loads(arguments)
    return answer


def add(answer: Answer, delta: Delta) -> None:
    if delta.kind == "call":
        assert delta.index == len(answer.calls)
        answer.calls.append((delta.text, ""))
    elif delta.kind == "arguments":
        name, arguments = answer.calls[-1]
        assert delta.index == len(answer.calls) - 1
        answer.calls[-1] = name, arguments + delta.text
    else:
        setattr(answer, delta.kind, getattr(answer, delta.kind) + delta.text)
    assert delta.kind == "text" or not delta.steps
    answer.steps += delta.steps
    if not answer.order.endswith(delta.kind[0]):
        answer.order += delta.kind[0]


CUTS = st.one_of(st.lists(st.integers(0, 300)), st.just(list(range(300))))
SCRIPT = (
    "Let me see.\n\n</think> <tool_call> spelled out is text: ｜é🙂\n⟨end⟩\n3 r's: naïve 🙂\n</think> <tool_call>"
    f" ⟨/call⟩ \n\n⟨call⟩{WRITE}⟨/call⟩\n \n⟨call⟩{ADD}⟨/call⟩\n\nDone. 🙂\n"
)


@given(CUTS)
def test_every_split_into_tokens_gives_the_same_answer(cuts: list[int]) -> None:
    answer = run(SCRIPT, cuts)
    assert answer.reasoning == "Let me see.\n\n</think> <tool_call> spelled out is text: ｜é🙂"
    assert answer.text == "3 r's: naïve 🙂\n</think> <tool_call> </tool_call>Done. 🙂\n"
    assert [(name, json.loads(arguments)) for name, arguments in answer.calls] == [("write", WRITTEN), ("add", ADDED)]
    assert answer.order == "rtcacat"
    assert answer.machine.warnings == []


@given(CUTS)
def test_tokens_are_counted_and_text_tokens_come_once(cuts: list[int]) -> None:
    script = "why\n⟨end⟩\nbecause é🙂\n\n of it\n"
    answer = run(script, cuts, tools=())
    all_steps = steps(script, cuts)
    n = all_steps.index(Step(*SPECIAL["⟨end⟩"])) + 1
    assert (answer.machine.n_reasoning, answer.machine.n_text) == (n, len(all_steps) - n)
    shown = all_steps[n + (all_steps[n].piece == b"\n") :]  # a token that is the protocol's line break is in no delta
    assert answer.steps == shown
    assert run(script, cuts).steps == shown


def test_what_is_forced_on_the_model_is_shown_and_not_counted() -> None:
    machine = OutputMachine(MARKERS, in_reasoning=True)
    forced = [Step(1, b"Enough.", forced=True), Step(END, b"</think>", forced=True), Step(2, b"\n", forced=True)]
    deltas = [d for step in (Step(3, b"Hm. "), *forced, Step(4, b"5")) for d in machine.feed(step)]
    assert [(d.kind, d.text) for d in deltas] == [("reasoning", "Hm. "), ("reasoning", "Enough."), ("text", "5")]
    assert (machine.n_reasoning, machine.n_text) == (1, 1)


def test_tokens_of_a_call_count_as_text_and_have_no_place_in_it() -> None:
    script = f"x⟨end⟩ab \n⟨call⟩{ADD}⟨/call⟩"
    answer = run(script, [0])
    assert answer.machine.n_reasoning == 2
    assert answer.machine.n_text == len(steps(script, [0])) - 2
    assert b"".join(step.piece for step in answer.steps) == b"ab"


@given(CUTS)
def test_a_call_in_the_reasoning_ends_it(cuts: list[int]) -> None:
    answer = run(f"Let me\n⟨call⟩{ADD}⟨/call⟩", cuts)
    assert (answer.reasoning, answer.text) == ("Let me", "")
    assert json.loads(answer.calls[0][1]) == ADDED


def test_without_tools_the_markers_of_calls_are_text() -> None:
    answer = run(f"a ⟨call⟩ b⟨end⟩\n⟨call⟩{ADD}⟨/call⟩\n", [], tools=())
    assert answer.reasoning == "a <tool_call> b"
    assert answer.text == f"<tool_call>{ADD}</tool_call>\n"


def test_markers_inside_of_a_value_are_its_text() -> None:
    value = "<tool_call>\n<function=f>\n</tool_call></think>"
    script = WRITE.replace("a/é.py", "⟨call⟩\n<function=f>\n⟨/call⟩⟨end⟩")
    answer = run(f"⟨end⟩⟨call⟩{script}⟨/call⟩after", [])
    assert json.loads(answer.calls[0][1])["path"] == value
    assert answer.text == "after"


def test_reasoning_that_never_ends_is_all_there() -> None:
    assert run("so\n\n", [1]).reasoning == "so\n\n"


def test_without_reasoning_everything_is_text() -> None:
    answer = run("\n <think> x </think>\n", [1, 3], in_reasoning=False)
    assert (answer.text, answer.reasoning) == ("\n <think> x </think>\n", "")


@given(CUTS)
def test_reasoning_that_the_model_opens_itself_is_split_off(cuts: list[int]) -> None:
    for opening in ("⟨think⟩\n", "⟨think⟩", "\n \n⟨think⟩\n"):
        answer = run(f"{opening}why é\n⟨end⟩\nbecause ⟨think⟩", cuts, in_reasoning=False)
        assert (answer.reasoning, answer.text) == ("why é", "because <think>")
        assert answer.machine.n_reasoning == len(steps(f"{opening}why é\n⟨end⟩", cuts))
        assert answer.machine.warnings == []


@given(CUTS)
def test_only_the_start_of_an_answer_opens_reasoning(cuts: list[int]) -> None:
    answer = run("So ⟨think⟩ it is\n", cuts, in_reasoning=False)
    assert (answer.reasoning, answer.text) == ("", "So <think> it is\n")
    assert run("why⟨end⟩\n⟨think⟩ x", cuts).text == "<think> x"


def settled(script: str, cuts: list[int], *, in_reasoning: bool = True) -> tuple[str, str]:
    """Reasoning and text of the whole answer."""
    reply = Reply(PreparedRequest(Request((0,)), MARKERS, in_reasoning, TOOLS, ()))
    deltas = reply.feed(Tokens(tuple(steps(script, cuts)))) + reply.feed(Finished("stop", Timings()))
    texts = {
        kind: "".join(d.text for d in reply.settle_reasoning(deltas) if d.kind == kind)
        for kind in ("reasoning", "text")
    }
    return texts["reasoning"], texts["text"]


@pytest.mark.slow
@given(CUTS, st.booleans())
def test_an_end_of_reasoning_in_the_answer_is_never_text(cuts: list[int], in_reasoning: bool) -> None:
    start = "so⟨end⟩\n" if in_reasoning else ""
    script = f"{start}No, é wait\n⟨end⟩\n3 r's\n⟨end⟩⟨end⟩\nor 4"
    answer = run(script, cuts, in_reasoning=in_reasoning)
    assert "think>" not in answer.text + answer.reasoning
    reasoning = "soNo, é wait3 r's" if in_reasoning else "No, é wait3 r's"
    assert settled(script, cuts, in_reasoning=in_reasoning) == (reasoning, "or 4")
    assert len(answer.machine.warnings) == 3
    ids = [step.token_id for step in steps(script, cuts)]
    assert answer.machine.n_text == ids[::-1].index(END)
    assert answer.machine.n_reasoning == len(ids) - ids[::-1].index(END)


@given(CUTS)
def test_an_answer_that_ends_with_an_end_of_reasoning_is_an_answer(cuts: list[int]) -> None:
    assert settled("why⟨end⟩\n3 r's⟨end⟩", cuts) == ("why", "3 r's")
    assert settled(f"why⟨end⟩\nI call⟨call⟩{ADD}⟨/call⟩⟨end⟩\nDone", cuts) == ("why", "I callDone")


def test_bytes_that_are_no_text_are_replaced_and_not_lost() -> None:
    for tools in ((), TOOLS):
        machine = OutputMachine(MARKERS, in_reasoning=True, tools=tools)
        tokens = [Step(1, b"a\n"), Step(1, b"\xff"), Step(1, b"\xf0"), Step(*SPECIAL["⟨end⟩"]), Step(1, b"b\xf0\x9f")]
        deltas = [d for step in tokens for d in machine.feed(step)] + machine.close()
        assert "".join(d.text for d in deltas) == "a\n\ufffd\ufffdb\ufffd"
    broken = [Step(1, b"\n\xf0"), Step(CALL, b"<tool_call>"), Step(1, b"\xf0"), Step(END_CALL, b"</tool_call>")]
    machine = OutputMachine(MARKERS, in_reasoning=True, tools=TOOLS)
    deltas = [d for step in broken for d in machine.feed(step)] + machine.close()
    assert [(d.kind, d.text) for d in deltas if d.kind == "reasoning"] == [("reasoning", "\n\ufffd")]
    assert "".join(d.text for d in deltas if d.kind == "text") == "<tool_call>\ufffd</tool_call>"


# stops ---------------------------------------------------------------------------------------------------------------


@given(CUTS, st.lists(st.sampled_from(["STOP", "TOP SECRET", "é🙂", "\n\n", "abab", "b", "End"]), max_size=3))
def test_a_stop_is_found_across_tokens_and_not_shown(cuts: list[int], stops: list[str]) -> None:
    text = "ST STO é aba \n ababx TOP SECRE ST🙂OP é🙂 the\n\nEnd STOP"
    ends = sorted((text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text)
    for tools in ((), TOOLS):
        answer = run(f"thinks STOP b\n\nEnd⟨end⟩\n{text}", cuts, stops=tuple(stops), tools=tools)
        assert answer.reasoning == "thinks STOP b\n\nEnd"
        assert answer.text == (text[: ends[0][0] + ends[0][1]] if ends else text)
        assert answer.machine.stopped == (ends[0][2] if ends else None)


def test_nothing_comes_after_a_stop() -> None:
    machine = OutputMachine(MARKERS, in_reasoning=False, stops=("b",))
    assert [d.text for d in machine.feed(Step(1, b"abc"))] == ["a"]
    assert machine.feed(Step(1, b"d")) == []
    assert machine.close() == []
    assert machine.n_text == 1


def test_no_more_is_held_back_than_may_be_a_stop() -> None:
    machine = OutputMachine(MARKERS, in_reasoning=False, stops=("STOP", "TOAST"))
    shown = [[d.text for d in machine.feed(Step(1, piece.encode()))] for piece in ("a ST", "O", "A", "S", "S")]
    assert shown == [["a "], [], ["S"], [], ["TOAS"]]
    assert [d.text for d in machine.close()] == ["S"]


def test_stops_are_not_looked_for_in_calls() -> None:
    answer = run(f"⟨end⟩⟨call⟩{ADD}⟨/call⟩", [3], stops=("parameter", "5", "\n"))
    assert json.loads(answer.calls[0][1]) == ADDED
    assert answer.machine.stopped is None


def test_what_might_have_been_a_stop_is_shown_before_a_call() -> None:
    answer = run(f"⟨end⟩a ST \n\n⟨call⟩{ADD}⟨/call⟩", [2], stops=("ST \n\nX",))
    assert answer.text == "a ST"
    assert len(answer.calls) == 1


# malformed calls -----------------------------------------------------------------------------------------------------

MALFORMED = [
    "",
    "hello",
    "\n",
    "\n<functi",
    "\n<function=nope>\n</function>\n",
    '\n{"name": "add", "arguments": {"a": 1}}\n',
    "\n<function=add\n",
    "\n<parameter=a>\n5\n</parameter>\n",
    "🙂",
]


@given(st.sampled_from(MALFORMED), CUTS, st.booleans())
def test_a_call_that_is_none_is_text_to_its_last_character(body: str, cuts: list[int], closed: bool) -> None:
    end = ("⟨/call⟩ and\n", "</tool_call> and\n") if closed else ("", "")
    answer = run(f"⟨end⟩\nOK: \n\n⟨call⟩{body}{end[0]}", cuts)
    assert answer.text == f"OK: \n\n<tool_call>{body}{end[1]}"
    assert answer.calls == []
    assert len(answer.machine.warnings) == 1


@given(CUTS)
def test_a_call_that_breaks_off_is_closed_and_the_rest_is_text(cuts: list[int]) -> None:
    head = "\n<function=add>\n<parameter=a>\n5\n</parameter>\n"
    for body, rest in [
        (f"{head}</function>\nso it is⟨/call⟩!", "so it is</tool_call>!"),
        ("\n<function=add>\nwhat⟨/call⟩!", "what</tool_call>!"),
    ]:
        answer = run(f"⟨end⟩⟨call⟩{body}", cuts)
        assert json.loads(answer.calls[0][1]) == ({} if "what" in body else {"a": 5})
        assert answer.text == rest
        assert len(answer.machine.warnings) == 1


TOKENS = list(range(0, 300, 3))


@pytest.mark.parametrize("in_reasoning", [True, False])
@pytest.mark.parametrize("before", ["", "Let me see.\n\n", f"⟨call⟩{ADD}⟨/call⟩\n"], ids=["", "text", "call"])
def test_a_call_that_is_cut_is_an_unclosed_prefix_and_nothing_leaks(before: str, in_reasoning: bool) -> None:
    whole = steps(f"{'why⟨end⟩' if in_reasoning else ''}\n{before}⟨call⟩{WRITE}⟨/call⟩", TOKENS)
    text = "Let me see." if "Let" in before else ""
    first = next(i for i, step in enumerate(whole) if step.token_id == CALL and (i > 20 or "⟨call⟩" not in before))
    for n in range(first + 1, len(whole)):
        machine = OutputMachine(MARKERS, in_reasoning=in_reasoning, tools=TOOLS)
        deltas = [d for step in whole[:n] for d in machine.feed(step)] + machine.close(cut=True)
        assert "".join(d.text for d in deltas if d.kind == "text").strip() == text
        calls = [d for d in deltas if d.kind == "call"]
        n_whole = before.count("⟨call⟩")
        assert machine.cut_call == (n_whole if len(calls) > n_whole else None)
        arguments = "".join(d.text for d in deltas if d.kind == "arguments" and d.index == n_whole)
        if machine.cut_call is not None:
            assert json.dumps(WRITTEN, ensure_ascii=False, separators=(",", ":")).startswith(arguments)
            assert arguments[:1] == "{"
            assert not arguments.endswith("}")
    machine = OutputMachine(MARKERS, in_reasoning=in_reasoning, tools=TOOLS)
    deltas = [d for step in whole for d in machine.feed(step)] + machine.close(cut=True)
    assert machine.cut_call is None


@given(CUTS)
def test_an_end_token_within_a_call_cuts_it_too_unless_it_is_whole(cuts: list[int]) -> None:
    answer = run(f"⟨end⟩⟨call⟩{WRITE[:60]}", cuts)
    assert answer.machine.cut_call == 0
    assert answer.text == ""
    whole = run(f"⟨end⟩⟨call⟩{WRITE.removesuffix('</function>' + chr(10))}", cuts)
    assert json.loads(whole.calls[0][1]) == WRITTEN
    assert (whole.machine.cut_call, whole.text) == (None, "")


@given(CUTS)
def test_a_call_whose_last_value_has_no_end_ends_with_its_token(cuts: list[int]) -> None:
    answer = run("⟨end⟩⟨call⟩\n<function=write>\n<parameter=text>\npwd\n</function>\n⟨/call⟩after", cuts)
    assert json.loads(answer.calls[0][1]) == {"text": "pwd"}
    assert answer.text == "after"
    assert len(answer.machine.warnings) == 1


# calls without their token -------------------------------------------------------------------------------------------


@given(CUTS, st.sampled_from(["", "\n", "⟨/call⟩", "\n⟨/call⟩\n"]))
def test_a_line_that_starts_with_an_offered_function_is_a_call(cuts: list[int], end: str) -> None:
    for before in ("", "Let me.\n\n", "x <y\n <"):
        answer = run(f"why⟨end⟩\n{before}\n<function=add>{ADD.partition('>')[2].rstrip()}{end}", cuts)
        assert [(name, json.loads(arguments)) for name, arguments in answer.calls] == [("add", ADDED)]
        assert answer.text == before.rstrip()
        assert answer.machine.warnings == ["a tool call has no <tool_call>"]


@given(CUTS)
def test_a_function_that_was_not_offered_or_stands_in_a_line_is_text(cuts: list[int]) -> None:
    for text in ("<function=nope>\n</function>", "see <function=add>\n", "<functional>", "`<function=add>`", "\n<"):
        assert run(f"⟨end⟩\n{text}", cuts).text == text
    assert run(f"⟨end⟩\n{ADD}", cuts, tools=()).text == ADD


@pytest.mark.parametrize("n", range(1, len(ADD) - 2))
def test_a_call_without_its_token_that_is_cut_does_not_leak(n: int) -> None:
    answer = run(f"⟨end⟩{ADD[:n]}", TOKENS, cut=True)
    assert answer.text.strip() == ""
    assert (answer.machine.cut_call == 0) == bool(answer.calls)


def test_a_call_may_follow_one_that_lacks_its_end() -> None:
    answer = run(f"⟨end⟩⟨call⟩{ADD}⟨call⟩{ADD}⟨/call⟩", [])
    assert [json.loads(arguments) for _, arguments in answer.calls] == [ADDED, ADDED]
