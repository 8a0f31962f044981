from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from stepgguf.chat.output import OutputMachine

END = 99
SCRIPT = "Let me see.\n\n</think> spelled out is text: ｜é🙂\n"
ANSWER = "\n3 r's: naïve 🙂\n</think>\ndone"


def run(reasoning: list[bytes], answer: list[bytes], close: bool = True) -> dict[str, str]:
    machine = OutputMachine(END)
    parts = {"reasoning": "", "text": ""}
    tokens = [(1, p) for p in reasoning] + ([(END, b"</think>")] if close else []) + [(1, p) for p in answer]
    for token_id, piece in tokens:
        for delta in machine.feed(token_id, piece):
            assert delta.text
            parts[delta.kind] += delta.text
    for delta in machine.close():
        parts[delta.kind] += delta.text
    assert machine.n_reasoning == len(reasoning) + close
    assert machine.n_text == len(answer)
    return parts


def pieces(text: str, cuts: list[int]) -> list[bytes]:
    data = text.encode()
    edges = sorted({0, len(data), *(c % (len(data) + 1) for c in cuts)})
    return [data[a:b] for a, b in pairwise(edges)]


@given(st.lists(st.integers(0, 500)), st.lists(st.integers(0, 500)))
def test_every_split_into_tokens_gives_the_same_text(a: list[int], b: list[int]) -> None:
    parts = run(pieces(SCRIPT, a), pieces(ANSWER, b))
    assert parts == {"reasoning": SCRIPT.removesuffix("\n"), "text": ANSWER.removeprefix("\n")}


def test_reasoning_that_never_ends_is_all_there() -> None:
    assert run(pieces(SCRIPT, [5, 9]), [], close=False) == {"reasoning": SCRIPT, "text": ""}


def test_without_thinking_everything_is_text() -> None:
    machine = OutputMachine(None)
    assert [d.kind for d in machine.feed(1, b"x")] == ["text"]


def test_bytes_that_are_no_text_are_replaced_and_not_lost() -> None:
    assert run([b"\xff"], [b"a\xf0\x9f"]) == {"reasoning": "�", "text": "a�"}
