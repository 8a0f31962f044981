"""From a ChatRequest to an engine's Request, and from the engine's events back to deltas.

    ChatRequest -template-> text -tokenize-> Request -engine-> events -Reply-> deltas

Everything that can be refused is refused in `prepare`, before anything runs. Terminal, streams and whole answers are
folds over the same deltas.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from stepgguf.chat.answer_grammar import constrain_answer
from stepgguf.chat.messages import normalize_messages
from stepgguf.chat.output import Delta, Markers, OutputMachine
from stepgguf.chat.request import ChatRequest, Tool
from stepgguf.chat.template import CLOSING_WORDS, ChatTemplate, PromptEnding, closing_text, prompt_ending
from stepgguf.errors import BadMetadata
from stepgguf.runtime.engine import Engine, Event, Finished, Reasoning, Request, Sampling, Timings, Tokens

ANSWER_SHARE = 4  # with a budget for reasoning, a quarter of what may be generated stays for the answer


class ChatModel:
    """An engine and the template that its model file carries.

    closing_message: what the model is made to say last in a reasoning that is cut off. break_loops: end reasoning that
    repeats itself. BadMetadata: the file has no chat template, or is no Step-3.5 model's.
    """

    def __init__(self, engine: Engine, *, closing_message: str = CLOSING_WORDS, break_loops: bool = True) -> None:
        source = engine.info.chat_template
        if source is None:
            raise BadMetadata(
                f"{engine.info.name} has no chat template", hint="Add one: stepgguf template FILE.gguf NEW.jinja"
            )
        self.engine, self._break_loops = engine, break_loops
        self._template = ChatTemplate(source)
        end = engine.token_id("</think>")
        if end is None:
            raise BadMetadata(f"{engine.info.name} has no token </think>", hint="It is not a Step-3.5 model's file.")
        self.markers = Markers(
            end, engine.token_id("<tool_call>"), engine.token_id("</tool_call>"), engine.token_id("<think>")
        )
        self._turn_token = engine.token_id("<|im_start|>")
        self._user_token = engine.tokenize_piece("user")[0]
        self._closing_alone = closing_text(closing_message, after=False)
        self._closing_tokens = tuple(engine.tokenize_piece(closing_text(closing_message, after=True)))

    def render_prompt(self, request: ChatRequest) -> tuple[list[int], PromptEnding]:
        """Return the prompt as token ids, and where it ends. RequestError: the template cannot show the messages."""
        tools = [_tool_as_json(tool) for tool in request.tools] if request.tool_choice.mode != "none" else []
        text = self._template.render(normalize_messages(request.messages), tools=tools or None)
        ending = prompt_ending(text)
        if ending != "answer" and self._reasoning_budget(request) == 0:  # closed in the prompt, so that none begins
            text, ending = text + ("" if ending == "reasoning" else "<think>\n") + self._closing_alone, "answer"
        return self.engine.tokenize(text), ending

    def prepare(self, request: ChatRequest) -> PreparedRequest:
        """Return what the engine is to do. RequestError or BadMetadata say what cannot be done."""
        prompt, ending = self.render_prompt(request)
        tools = request.tools if request.tool_choice.mode != "none" and not request.withhold_calls else ()
        in_reasoning = ending == "reasoning"
        grammar = constrain_answer(
            self.markers,
            in_reasoning=in_reasoning,
            format=request.format,
            tools=tools,
            choice=request.tool_choice,
            parallel=request.parallel_tool_calls,
        )
        return PreparedRequest(
            Request(
                prompt=tuple(prompt),
                sampling=self._without_calls(request.sampling) if request.withhold_calls else request.sampling,
                max_tokens=request.max_tokens,
                grammar=grammar,
                reasoning=self._reasoning_limits(request, tools, ending, len(prompt)),
                turns=self._turn_starts(prompt),
                top_logprobs=request.top_logprobs,
                banned=self._reasoning_tokens,
            ),
            self.markers,
            in_reasoning,
            tools,
            request.stops,
        )

    def _without_calls(self, sampling: Sampling) -> Sampling:
        """Return a sampling in which the token that begins a call never comes."""
        never = () if self.markers.call is None else ((self.markers.call, -math.inf),)
        return replace(sampling, logit_bias=(*sampling.logit_bias, *never))

    @property
    def _reasoning_tokens(self) -> frozenset[int]:
        """What opens and closes reasoning: banned once it was closed for the model, or it would go on in its answer."""
        return frozenset(
            token for token in (self.markers.start_of_reasoning, self.markers.end_of_reasoning) if token is not None
        )

    def _reasoning_budget(self, request: ChatRequest, n_prompt: int = 0) -> int | None:
        """Tokens of reasoning, None for no limit.

        What closes it and an answer must find room in max_tokens, and in what the prompt leaves of the context.
        """
        if request.reasoning_budget is None:
            return None
        room = self.engine.info.n_ctx - n_prompt
        most = min(room, request.max_tokens or room)
        return max(0, min(request.reasoning_budget, most - most // ANSWER_SHARE - len(self._closing_tokens)))

    def _reasoning_limits(
        self, request: ChatRequest, tools: tuple[Tool, ...], ending: PromptEnding, n_prompt: int
    ) -> Reasoning | None:
        if ending == "answer" or (ending == "start" and self.markers.start_of_reasoning is None):
            return None
        call = self.markers.call if tools else None  # a call ends reasoning too
        ends = frozenset(token for token in (self.markers.end_of_reasoning, call) if token is not None)
        opening = self.markers.start_of_reasoning if ending == "start" else None
        return Reasoning(
            ends, self._closing_tokens, self._reasoning_budget(request, n_prompt), self._break_loops, opening
        )

    def _turn_starts(self, prompt: list[int]) -> tuple[int, ...]:
        """Where user messages start, and the answer: the next prompt departs from this one at one of these.

        The template drops the reasoning of earlier turns, so what the cache keeps is kept at such places.
        """
        starts = [i for i, token in enumerate(prompt[:-1]) if token == self._turn_token]
        return tuple(i for i in starts if prompt[i + 1] == self._user_token or i == starts[-1])


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """What to submit, `request`, and what is needed to read the answer."""

    request: Request
    markers: Markers
    in_reasoning: bool
    tools: tuple[Tool, ...]
    stops: tuple[str, ...]


class Reply:
    """Reads the events of one request as deltas. When `stopped`, a stop text was found: cancel the request.

    For a whole answer `settle_reasoning` has the last word on the deltas. `cut_call` is the index of a tool call that
    was not finished, if there is one: its arguments are an unclosed prefix of JSON, and nobody may run it.
    """

    def __init__(self, prepared: PreparedRequest) -> None:
        self._machine = OutputMachine(
            prepared.markers, in_reasoning=prepared.in_reasoning, tools=prepared.tools, stops=prepared.stops
        )
        self.finished: Finished | None = None

    def feed(self, event: Event) -> list[Delta]:
        """Return what an event brings of the answer."""
        if isinstance(event, Tokens):
            return [delta for step in event.steps for delta in self._machine.feed(step)]
        if isinstance(event, Finished):
            self.finished = event
            return self._machine.close(cut=event.reason != "stop")
        return []

    def settle_reasoning(self, deltas: Sequence[Delta]) -> list[Delta]:
        """Return an answer's deltas with the text before a misplaced </think> as reasoning, unless nothing follows."""
        last = self._machine.n_misplaced
        if not any(d.kind == "call" or (d.kind == "text" and d.index == last) for d in deltas):
            return list(deltas)
        return [Delta("reasoning", d.text) if d.kind == "text" and d.index < last else d for d in deltas]

    @property
    def stopped(self) -> str | None:
        """The stop text that ended the answer, None if none did."""
        return self._machine.stopped

    @property
    def cut_call(self) -> int | None:
        """The index of the tool call that was not finished, None if there is none."""
        return self._machine.cut_call

    @property
    def warnings(self) -> list[str]:
        """What the model did wrong so far, in sentences."""
        return self._machine.warnings

    @property
    def n_reasoning(self) -> int:
        """Tokens of reasoning that the model made so far."""
        return self._machine.n_reasoning

    @property
    def timings(self) -> Timings:
        """The engine's counts; only once it has finished."""
        assert self.finished is not None
        return self.finished.timings

    @property
    def reasoning_cut(self) -> str | None:
        """Why the reasoning was ended before the model ended it, "budget" or "loop"; None if it was not."""
        if self.timings.loop_broken:
            return "loop"
        return "budget" if self.timings.budget_reached else None

    @property
    def finish_reason(self) -> str:
        """OpenAI's word for how it ended: stop, length, tool_calls; after an error: error."""
        assert self.finished is not None
        if self._machine.stopped is not None:
            return "stop"
        if self.cut_call is not None and self.finished.reason != "error":
            return "length"
        if self.finished.reason == "stop" and self._machine.n_calls:
            return "tool_calls"
        return "stop" if self.finished.reason == "cancelled" else self.finished.reason


def _tool_as_json(tool: Tool) -> dict[str, object]:
    """A tool as the template shows it to the model, which learned OpenAI's form."""
    function: dict[str, object] = {"name": tool.name}
    if tool.description is not None:
        function["description"] = tool.description
    if tool.parameters:
        function["parameters"] = tool.parameters
    return {"type": "function", "function": function}
