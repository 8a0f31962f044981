"""What a client of Anthropic's Messages API asks for, as a ChatRequest.

    messages  turn by turn; see turns.py
    system    one message, from a string or from text blocks

Images and documents are refused in what the user has just written, and nowhere else. Blocks and tools that mean nothing
to this model are left out with a line in the log, unless tool_choice demands such a tool.

`thinking`. This model always reasons unless its budget is 0.
    absent         it reasons, no more than effort medium does and in at most half of max_tokens, and no thinking blocks
                   are sent. Clients that do not ask for them read content[0].text, wait for no more than an answer
                   without reasoning would take, and chose max_tokens for the answer alone
    enabled        at most budget_tokens; blocks are sent
    adaptive       as much as it likes; blocks are sent
    disabled       none
output_config.effort, and whatever other vendors call it (body/reasoning.py), is a limit as reasoning_effort is in chat
completions; the least counts. display "omitted": see dialects/sealed_reasoning.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from stepgguf.chat.request import ChatRequest, JsonSchema, Tool, ToolChoice
from stepgguf.errors import RequestError
from stepgguf.server.body.hosted import CONVERSATION
from stepgguf.server.body.objects import CheckedObject, RequestObject, ignored
from stepgguf.server.body.reasoning import ReasoningAmounts, ReasoningMap, Spelling
from stepgguf.server.body.sampling import UNLIMITED, AnswerTokens, Effort, SamplingFields, token_limit
from stepgguf.server.body.unreadable import newest_user_message, paragraphs, refuse_unreadable
from stepgguf.server.config import ServerConfig
from stepgguf.server.dialects.function_tools import FunctionDeclaration, as_tools
from stepgguf.server.dialects.messages.turns import Texts, Turn
from stepgguf.server.dialects.messages.writer import Display
from stepgguf.server.service import Service


class MessagesTool(FunctionDeclaration):
    """A tool that the client runs."""

    type: str | None = None
    parameters: dict[str, Any] | None = Field(alias="input_schema")
    eager_input_streaming: object = ignored("arguments are streamed as they come")


class MessagesForeignTool(RequestObject):
    """One whose schema only Anthropic's models know (bash_20250124), or that runs on its servers (web_search)."""

    type: str
    name: str | None = None


def _tool_tag(tool: Any) -> str:
    tool_type = tool.get("type") if isinstance(tool, dict) else None
    # A client's own tool has a schema, whatever type it says it is of.
    is_foreign = isinstance(tool_type, str) and tool_type != "custom" and "input_schema" not in tool
    return "foreign" if is_foreign else "custom"


MessagesAnyTool = Annotated[
    Annotated[MessagesTool, Tag("custom")] | Annotated[MessagesForeignTool, Tag("foreign")], Discriminator(_tool_tag)
]


class MessagesToolChoice(CheckedObject):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    def as_tool_choice(self) -> ToolChoice:
        """Return the choice as a ChatRequest has it. RequestError: a tool is to be called, and it is not said which."""
        if self.type == "tool":
            if self.name is None:
                raise RequestError("tool_choice of type tool has no name", param="tool_choice.name")
            return ToolChoice("required", self.name)
        return ToolChoice("required" if self.type == "any" else self.type)


class MessagesJsonFormat(RequestObject):
    type: Literal["json_schema"]
    format_schema: dict[str, Any] = Field(alias="schema")


class OutputConfig(CheckedObject):
    effort: Effort | None = None
    format: MessagesJsonFormat | None = None
    task_budget: object = ignored("max_tokens is the limit")


class MessagesPrompt(ReasoningAmounts):
    """The fields of both routes: those that make the prompt, which count_tokens counts, and those without effect."""

    model: str | None = Field(None, description="Any id: one model is served. Default: its own.")
    messages: list[Turn] = Field(min_length=1, description="The conversation; the last message is the user's.")
    system: Texts | None = Field(None, description="The system prompt.")
    tools: list[MessagesAnyTool] | None = Field(
        None, description="Tools that the client runs; those that Anthropic defines are left out."
    )
    tool_choice: MessagesToolChoice | None = Field(
        None, description="Whether a tool is called: auto, any, none, or one by its name."
    )
    output_config: OutputConfig | None = Field(
        None, description="effort: how much to think; format: the JSON schema of the answer."
    )
    output_format: MessagesJsonFormat | None = Field(None, description="The old name of output_config.format.")

    cache_control: object = ignored("every prefix is found without marks")
    context_management: object = ignored("a prompt that does not fit is refused, not cut")
    compaction: object = ignored("a prompt that does not fit is refused, not cut")
    mcp_servers: object = ignored("nothing is called from here; offer their tools in `tools`")
    speed: object = ignored("there is one speed")
    billing_policy: object = ignored("nothing is billed")
    user_profile_id: object = ignored("there is one user")
    workspace_id: object = ignored("there is one workspace")
    betas: object = ignored("what is known is always on")

    def chat_request(self, service: Service) -> ChatRequest:
        """Return what is asked of the model. RequestError: the fields do not go together."""
        choice = self.tool_choice or MessagesToolChoice(type="auto")
        config = self.output_config or OutputConfig()
        form = config.format or self.output_format
        service.unknown.ignore("type of tool", (t.type for t in self.tools or () if isinstance(t, MessagesForeignTool)))
        service.unknown.ignore("type of block", (block_type for turn in self.messages for block_type in turn.left_out))
        return ChatRequest(
            messages=[*self.system_messages(), *(message for turn in self.messages for message in turn.messages())],
            sampling=service.engine.info.sampling,
            tools=self._tools(choice),
            tool_choice=choice.as_tool_choice(),
            parallel_tool_calls=not choice.disable_parallel_tool_use,
            format=JsonSchema(form.format_schema) if form else None,
            reasoning_budget=self._budget(service.config),
        )

    def _tools(self, choice: MessagesToolChoice) -> tuple[Tool, ...]:
        foreign = [tool for tool in self.tools or () if isinstance(tool, MessagesForeignTool)]
        offered = [tool for tool in self.tools or () if isinstance(tool, MessagesTool)]
        forced = [tool for tool in foreign if choice.type == "tool" and tool.name == choice.name]
        if choice.type == "any" and not offered:  # nothing is left that could be called
            forced = foreign
        if forced:
            raise RequestError(
                f"{forced[0].name or 'a tool'} must be called, but {forced[0].type} is a tool that Anthropic defines",
                param="tool_choice",
                hint="This server takes tools with a name and an input_schema.",
            )
        return as_tools(offered)

    def system_messages(self) -> Iterator[dict[str, Any]]:
        """Yield the system prompt as OpenAI's chat message, if it has text."""
        text = paragraphs(block.text for block in self.system or ())
        if text:
            yield {"role": "system", "content": text}

    def spellings(self) -> Iterator[Spelling]:
        yield from super().spellings()
        yield self.output_config.effort if self.output_config is not None else None

    def _budget(self, config: ServerConfig) -> int | None:
        """Return the most tokens of reasoning; None is no limit."""
        says_nothing = all(spelling is None for spelling in self.spellings())
        return config.efforts["medium"] if says_nothing else self.reasoning_limit(config)


class MessagesBody(MessagesPrompt, SamplingFields):
    """The body of a request for an answer. Anthropic's temperature ends at 1; up to 2 is taken, as by StepFun's own
    Messages API."""

    elsewhere: ClassVar = {"thread": "nothing is stored here: send the whole conversation as `messages`"}
    max_tokens: AnswerTokens = Field(description=f"Thinking counts. {UNLIMITED}: what the context holds.")
    stop_sequences: list[str] | None = Field(None, description="Texts that end the answer.")
    stream: bool | None = Field(None, description="Send the answer in events as it comes.")

    metadata: object = Field(None, description=f"user_id: {CONVERSATION}")
    service_tier: object = ignored("there is one tier")
    container: object = ignored("nothing is run here")
    diagnostics: object = ignored("usage says what came from the cache")
    inference_geo: object = ignored("it runs where it runs")
    fallbacks: object = ignored("there is one model")
    fallback_credit_token: object = ignored("nothing is billed")

    @property
    def display(self) -> Display:
        """How reasoning is sent: not at all unless the client asks for thinking."""
        if self.thinking is None:
            return "hidden"
        is_omitted = isinstance(self.thinking, ReasoningMap) and self.thinking.display == "omitted"
        return "omitted" if is_omitted else "shown"

    def chat_request(self, service: Service) -> ChatRequest:
        """Return what is asked of the model. RequestError: the fields do not go together, or the last message is the
        assistant's.

        Anthropic's older models continue such a message; this model's turn starts with its reasoning.
        """
        if self.messages[-1].role == "assistant":
            raise RequestError(
                "the last message is the assistant's",
                param=f"messages[{len(self.messages) - 1}]",
                hint="This model cannot continue an answer; end with a message of role user.",
            )
        written = newest_user_message(["tool" if turn.has_results else turn.role for turn in self.messages])
        if written is not None:
            turn = self.messages[written]
            refuse_unreadable((b if turn.renders(b) else None for b in turn.content), f"messages[{written}].content")
        info = service.engine.info
        return replace(
            super().chat_request(service),
            sampling=self.sampling(info.sampling, info.n_vocab),
            max_tokens=token_limit(self.max_tokens),
            stops=(*self.stop_texts(), *(self.stop_sequences or ())),
            conversation=self._conversation,
        )

    @property
    def _conversation(self) -> str:
        """What the client calls the conversation: Claude Code's user_id holds the session's id."""
        user = self.metadata.get("user_id") if isinstance(self.metadata, dict) else None
        return user if isinstance(user, str) else ""

    def _budget(self, config: ServerConfig) -> int | None:
        budget = super()._budget(config)
        if self.thinking is not None or token_limit(self.max_tokens) is None:
            return budget
        half = self.max_tokens // 2  # the client chose max_tokens for the answer and knows of no reasoning
        return half if budget is None else min(budget, half)
