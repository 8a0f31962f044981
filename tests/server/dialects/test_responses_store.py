"""Answers that are kept: continued, fetched, attached to, cancelled, forgotten. OpenAI's own client asks."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Iterator
from typing import Any, cast

import httpx
import openai
import pytest
from openai.types.responses import Response, ResponseItemList, ResponseStreamEvent
from pydantic import TypeAdapter

from stepgguf.server.dialects.responses.store import MOST_AT_ONCE, Answer
from stepgguf.server.dialects.responses.writer import ResponseWriter
from stepgguf.server.generation import AnswerPart, Generation
from tests.server.conftest import Serve, Server
from tests.server.dialects.answers import answer
from tests.server.dialects.test_responses import COLD, QUESTION, WEATHER
from tests.server.test_stream import ENDS

KNOWN: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def endless(server: Server, *, never: int | None = None, **fields: Any) -> dict[str, Any]:
    """An answer that comes to no end but that of the context."""
    ids = [server.engine.token_id(text) for text in ENDS] + [never]
    bias = {str(token): -100 for token in ids if token is not None}
    return {"input": "Hello", "reasoning": {"effort": "none"}, "logit_bias": bias, **fields}


def running(server: Server, client: openai.OpenAI, **fields: Any) -> Response:
    """Such an answer, in the background."""
    return client.responses.create(background=True, extra_body=endless(server, **fields))


def events_of(answer: httpx.Response) -> list[dict[str, Any]]:
    records = [record for record in answer.text.split("\n\n") if record.startswith("event: ")]
    return [json.loads(record.split("data: ", 1)[1]) for record in records]


def ended(server: Server, id: str) -> dict[str, Any]:
    """The answer, when it is finished."""
    for _ in range(1000):
        response: dict[str, Any] = server.client.get(f"/v1/responses/{id}").json()
        if response["status"] != "in_progress":
            return response
        time.sleep(0.02)
    raise AssertionError(response)


# a conversation that the server keeps ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_answer_is_continued_by_its_id(client: openai.OpenAI) -> None:
    first = client.responses.create(input="What is the weather in Paris?", tools=[WEATHER], **COLD)
    call = first.output[-1]
    output: Any = {"type": "function_call_output", "call_id": call.call_id, "output": '{"temp_c": 21, "sky": "sunny"}'}  # type: ignore[union-attr]
    second = client.responses.create(input=[output], tools=[WEATHER], previous_response_id=first.id, **COLD)
    assert second.output_text == "It is 21 degrees and sunny in Paris."
    assert second.previous_response_id == first.id
    third = client.responses.create(input=QUESTION, previous_response_id=second.id, **COLD)
    assert third.output_text == "There are 3 'r's."
    listed = client.responses.input_items.list(third.id, order="asc")
    kinds = ["message", "reasoning", "function_call", "function_call_output", "reasoning", "message", "message"]
    assert [item.type for item in listed.data] == kinds


def test_instructions_are_not_carried_over(server: Server, client: openai.OpenAI) -> None:
    first = client.responses.create(input="Hello", instructions="Be brief. " * 20, **COLD)
    assert first.usage is not None
    second = client.responses.input_tokens.count(input="Hello", previous_response_id=first.id)
    assert second.input_tokens < first.usage.input_tokens


def test_items_of_an_answer_come_back_as_their_ids(client: openai.OpenAI) -> None:
    first = client.responses.create(input="What is the weather in Paris?", tools=[WEATHER], **COLD)
    assert [item.type for item in first.output] == ["reasoning", "function_call"]
    call = first.output[-1]
    items: Any = [
        {"role": "user", "content": "What is the weather in Paris?"},
        *({"type": "item_reference", "id": item.id} for item in first.output),
        {"type": "function_call_output", "call_id": call.call_id, "output": '{"temp_c": 21, "sky": "sunny"}'},  # type: ignore[union-attr]
    ]
    referred = client.responses.input_tokens.count(input=items, tools=[WEATHER])
    items[1:3] = [item.to_dict() for item in first.output]
    sent = client.responses.input_tokens.count(input=items, tools=[WEATHER])
    assert referred == sent
    assert sent.object == "response.input_tokens"


@pytest.mark.slow
def test_an_id_of_an_input_item_is_a_reference_too(client: openai.OpenAI) -> None:
    first = client.responses.create(input=QUESTION, max_output_tokens=1, **COLD)
    (listed,) = client.responses.input_items.list(first.id).data
    again: Any = [{"id": listed.id}]
    plain = client.responses.input_tokens.count(input=QUESTION)
    assert client.responses.input_tokens.count(input=again) == plain


@pytest.mark.parametrize(
    ("fields", "status", "code", "param", "said"),
    [
        (
            {"previous_response_id": "resp_0"},
            400,
            "previous_response_not_found",
            "previous_response_id",
            "Previous response with id 'resp_0' not found",
        ),
        ({"input": [{"type": "item_reference", "id": "msg_0_0"}]}, 404, "not_found", "input[0]", "'msg_0_0' not found"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, 404, "not_found", "input[0]", "send the item itself"),
    ],
)
def test_what_is_not_kept_is_named(
    server: Server, fields: dict[str, Any], status: int, code: str, param: str, said: str
) -> None:
    answered = server.client.post("/v1/responses", json={"input": "Hello", **fields})
    error = answered.json()["error"]
    assert (answered.status_code, error["code"], error["param"]) == (status, code, param)
    assert said in error["message"]


def test_an_item_is_referred_to_once(server: Server, client: openai.OpenAI) -> None:
    """Else a small body could stand for a very large one."""
    first = client.responses.create(input=QUESTION, max_output_tokens=1, **COLD)
    twice = [{"type": "item_reference", "id": first.output[0].id}] * 2
    answered = server.client.post("/v1/responses", json={"input": twice})
    assert (answered.status_code, answered.json()["error"]["param"]) == (400, "input[1]")


# fetch, list, forget ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_answer_is_fetched_and_deleted(client: openai.OpenAI) -> None:
    made = client.responses.create(input=QUESTION, **COLD)
    assert client.responses.retrieve(made.id).to_dict() == made.to_dict()
    client.responses.delete(made.id)
    for verb in ("retrieve", "delete", "cancel"):
        with pytest.raises(openai.NotFoundError, match="kept in memory for an hour"):
            getattr(client.responses, verb)(made.id)
    with pytest.raises(openai.NotFoundError, match="not found"):
        client.responses.input_items.list(made.id)


@pytest.mark.slow
@pytest.mark.parametrize("streamed", [False, True])
def test_what_is_not_to_be_stored_is_not(client: openai.OpenAI, streamed: bool) -> None:
    asked: dict[str, Any] = {"input": QUESTION, "store": False, **COLD}
    if streamed:
        *_, last = client.responses.create(stream=True, **asked)
        id = last.response.id  # type: ignore[union-attr]
    else:
        id = client.responses.create(**asked).id
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(id)


@pytest.mark.slow
def test_input_items_are_listed_in_pages(server: Server, client: openai.OpenAI) -> None:
    items: Any = [{"role": "user", "content": f"{i}"} for i in range(5)]
    made = client.responses.create(input=items, max_output_tokens=1, **COLD)
    path = f"/v1/responses/{made.id}/input_items"
    first = server.client.get(path, params={"limit": 2}).json()
    ResponseItemList.model_validate(first)
    assert [item["content"][0]["text"] for item in first["data"]] == ["4", "3"]
    assert (first["last_id"], first["has_more"]) == (first["data"][1]["id"], True)
    rest = server.client.get(path, params={"after": first["last_id"], "limit": 9}).json()
    assert ([item["content"][0]["text"] for item in rest["data"]], rest["has_more"]) == (["2", "1", "0"], False)
    wrong = server.client.get(path, params={"limit": 0})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "limit")


@pytest.mark.slow
def test_the_store_is_bounded_in_count(serve: Serve) -> None:
    with serve(stored_answers=2) as server:
        ids = [made(server) for _ in range(3)]
        assert [found(server, id) for id in ids] == [False, True, True]
        assert found(server, ids[1])  # which makes ids[2] the one that was not used for longest
        last = made(server)
        assert [found(server, id) for id in (*ids, last)] == [False, True, False, True]


@pytest.mark.slow
def test_the_store_is_bounded_in_bytes(serve: Serve) -> None:
    with serve(stored_bytes=2500) as server:
        first, second = made(server, "a " * 700), made(server, "b " * 700)
        assert (found(server, first), found(server, second)) == (False, True)


@pytest.mark.slow
def test_answers_are_forgotten(serve: Serve) -> None:
    with serve(stored_seconds=0.0) as server:
        assert not found(server, made(server))


@pytest.mark.slow
def test_answers_are_forgotten_though_nobody_asks(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stepgguf.server.dialects.responses.store.SWEEP_SECONDS", 0.05)
    with serve(stored_seconds=0.5) as server:
        id = made(server)
        assert found(server, id)
        time.sleep(1)
        assert not found(server, id)


def made(server: Server, text: str = "Hello") -> str:
    answered = server.client.post("/v1/responses", json={"input": text, "max_output_tokens": 1})
    return str(answered.json()["id"])


def found(server: Server, id: str) -> bool:
    return server.client.get(f"/v1/responses/{id}").status_code == 200


# answers that go on by themselves -------------------------------------------------------------------------------------


def test_a_background_answer_is_there_at_once_and_whole_later(server: Server, client: openai.OpenAI) -> None:
    response = client.responses.create(input=QUESTION, background=True, **COLD)
    assert (response.status, response.background) == ("in_progress", True)
    done = Response.model_validate(ended(server, response.id))
    assert (done.status, done.output_text) == ("completed", "There are 3 'r's.")


def test_a_background_stream_goes_on_when_its_reader_leaves_and_is_found_again(server: Server) -> None:
    body = {"input": QUESTION, "background": True, "stream": True, **COLD}
    seen: list[dict[str, Any]] = []
    with server.client.stream("POST", "/v1/responses", json=body) as answered:
        for line in answered.iter_lines():
            if line.startswith("data: "):
                seen.append(json.loads(line.removeprefix("data: ")))
            if len(seen) == 7:
                break
    path = f"/v1/responses/{seen[0]['response']['id']}"
    rest = events_of(server.client.get(path, params={"stream": "true", "starting_after": 6}))
    assert [event["sequence_number"] for event in seen + rest] == list(range(7 + len(rest)))
    assert rest[-1]["type"] == "response.completed"
    texts = [event["delta"] for event in seen + rest if event["type"] == "response.output_text.delta"]
    assert "".join(texts) == "There are 3 'r's."


@pytest.mark.slow
def test_the_events_are_the_same_from_wherever_they_are_read(server: Server) -> None:
    live = events_of(server.client.post("/v1/responses", json={"input": QUESTION, "stream": True, **COLD}))
    id = live[0]["response"]["id"]
    for event in live:
        KNOWN.validate_python(event)
    for start in (None, 0, 1, 7, len(live) - 2, len(live) - 1, len(live) + 5):
        params: Any = {"stream": "true"} if start is None else {"stream": "true", "starting_after": start}
        replayed = events_of(server.client.get(f"/v1/responses/{id}", params=params))
        assert replayed == live[0 if start is None else start + 1 :]


def test_a_running_answer_is_attached_to_and_cancelled(server: Server, client: openai.OpenAI) -> None:
    response = running(server, client)
    with client.responses.retrieve(response.id, stream=True, starting_after=1) as stream:
        numbers = []
        for event in stream:
            numbers.append(event.sequence_number)
            if len(numbers) == 5:
                cancelled = client.responses.cancel(response.id)
            last = event
    assert numbers == list(range(2, 2 + len(numbers)))
    assert last.type == "response.incomplete"
    assert last.response.status == cancelled.status == "cancelled"
    assert cancelled.output[0].status == "incomplete"  # type: ignore[union-attr]
    assert server.idle_within(2)
    assert client.responses.cancel(response.id).status == "cancelled"


def test_deleting_a_running_answer_ends_it(server: Server, client: openai.OpenAI) -> None:
    response = running(server, client)
    client.responses.delete(response.id)
    assert server.idle_within(2)


@pytest.mark.slow
def test_a_background_answer_ends_with_its_server(server: Server, serve: Serve) -> None:
    with serve() as own:
        body = endless(own, background=True)
        assert own.client.post("/v1/responses", json=body).json()["status"] == "in_progress"
        assert not own.idle_within(0.3)
    assert server.idle_within(2), "they have one engine"


def test_an_answer_that_is_not_finished_cannot_be_continued(server: Server, client: openai.OpenAI) -> None:
    response = running(server, client)
    with pytest.raises(openai.BadRequestError, match="still being made"):
        client.responses.create(input="Hello", previous_response_id=response.id, **COLD)
    client.responses.cancel(response.id)


class Made:
    """A generation that is over at once, of an answer of so many words."""

    n_prompt = n_generated = 0
    warnings = ()

    def __init__(self, n_words: int) -> None:
        self._deltas, reply = answer(["</think>", *["word "] * n_words])
        self.replies = [reply]

    async def parts(self) -> AsyncGenerator[AnswerPart, None]:
        yield AnswerPart(0, self._deltas, None)

    def cancel(self) -> None:
        pass


def read_while_busy(n_words: int) -> list[list[dict[str, Any]]]:
    """What a reader gets who comes back only when the answer is finished."""

    async def read() -> list[list[dict[str, Any]]]:
        writer = ResponseWriter("abc", "demo", 0, b"{}", {})
        found = Answer(writer, cast(Generation, Made(n_words)), b"[]", keeps=True, background=False)
        told = []
        async for events in found.events():
            told.append([dict(event.data) for event in events])
            await found.wait_until_finished()
        return told

    return asyncio.run(read())


def test_what_comes_while_a_reader_is_busy_is_read_next() -> None:
    """The end, above all: of it nobody is told again."""
    names = [event["type"] for events in read_while_busy(1) for event in events]
    assert (names[0], names[-1]) == ("response.created", "response.completed")


def test_a_long_answer_is_told_in_parts() -> None:
    told = read_while_busy(1000)
    assert max(map(len, told)) == MOST_AT_ONCE
    numbers = [event["sequence_number"] for events in told for event in events]
    assert numbers == list(range(len(numbers)))
    assert told[-1][-1]["type"] == "response.completed"


@pytest.mark.slow
@pytest.mark.parametrize("streamed", [False, True])
def test_what_is_not_in_the_background_ends_with_its_request(server: Server, streamed: bool) -> None:
    body = json.dumps(endless(server, stream=streamed)).encode()
    head = "POST /v1/responses HTTP/1.1\nHost: localhost\nContent-Type: application/json\n"
    connection = server.raw(f"{head}Content-Length: {len(body)}\n\n", body)
    time.sleep(0.5)
    assert server.engine.stats().n_running == 1
    connection.close()
    assert server.idle_within(2)


def test_the_thinking_of_a_running_answer_is_ended(server: Server, client: openai.OpenAI) -> None:
    """The end of thinking is what the model may not choose here, so without it there would be no text."""
    end = server.engine.token_id("</think>")
    response = running(server, client, never=end, reasoning=None)
    with client.responses.retrieve(response.id, stream=True) as stream:
        n_thoughts = 0
        for event in stream:
            n_thoughts += event.type == "response.reasoning_text.delta"
            if n_thoughts == 3:
                client.post(f"/responses/{response.id}/end_reasoning", cast_to=object)
                n_thoughts += 1
            if event.type == "response.output_text.delta":
                break
    client.responses.cancel(response.id)
    assert event.type == "response.output_text.delta"


def test_a_background_answer_that_fails_says_so(dying: Server) -> None:
    with openai.OpenAI(base_url=f"{dying.url}/v1", api_key="none", max_retries=0) as client:
        response = client.responses.create(input=QUESTION, background=True, **COLD)
    done = ended(dying, response.id)
    assert done["status"] == "failed"
    assert done["error"]["message"].startswith("it broke")
