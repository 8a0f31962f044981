"""Prompts as they are, the list of models, the tokenizer, and how the server is."""

from __future__ import annotations

import json
from itertools import accumulate
from pathlib import Path

import llama_cpp
import pytest

from stepgguf.chat.exchange import ChatModel
from stepgguf.server.config import ServerConfig
from tests.scripted_engine import Pause, ScriptedEngine
from tests.server.conftest import Serve, Server, running

PROMPT = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n<think>\n"
RAW = "The user greets me. I will greet back.\n</think>\nHello! How can I help you?"


def complete(server: Server, **fields: object) -> dict:
    response = server.client.post("/v1/completions", json={"temperature": 0, "max_tokens": 64, **fields})
    assert response.status_code == 200, response.text
    return response.json()


def test_a_prompt_goes_on_without_template_or_parsing(server: Server) -> None:
    answer = complete(server, prompt=PROMPT)
    assert answer["choices"] == [{"index": 0, "text": RAW, "logprobs": None, "finish_reason": "stop"}]
    assert answer["object"] == "text_completion"


def test_texts_and_token_ids_are_the_same_prompt(server: Server) -> None:
    ids = server.client.post("/tokenize", json={"text": PROMPT}).json()["tokens"]
    answer = complete(server, prompt=[ids, ids])
    assert [choice["text"] for choice in answer["choices"]] == [RAW, RAW]
    assert answer["usage"]["prompt_tokens"] == len(ids)
    assert complete(server, prompt=ids)["choices"][0]["text"] == RAW


def test_the_prompt_is_echoed_and_a_stop_ends_the_text(server: Server) -> None:
    answer = complete(server, prompt=PROMPT, echo=True, stop=" greet back")
    assert answer["choices"][0]["text"].endswith(PROMPT + "The user greets me. I will")


def test_a_stream_says_the_same(server: Server) -> None:
    fields = {"prompt": PROMPT, "max_tokens": 64, "temperature": 0, "stream": True, "echo": True}
    response = server.client.post("/v1/completions", json={**fields, "stream_options": {"include_usage": True}})
    events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    *chunks, last = [json.loads(event) for event in events[:-1]]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks).endswith(PROMPT + RAW)
    assert [c["choices"][0]["finish_reason"] for c in chunks if c["choices"][0]["finish_reason"]] == ["stop"]
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 21


def test_logprobs_have_the_old_shape(server: Server) -> None:
    logprobs = complete(server, prompt=PROMPT, logprobs=2, max_tokens=4)["choices"][0]["logprobs"]
    assert set(logprobs) == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
    assert "".join(logprobs["tokens"]) == "The user greets me"
    assert logprobs["text_offset"] == list(accumulate(map(len, logprobs["tokens"]), initial=0))[:-1]
    assert all(len(top) == 2 for top in logprobs["top_logprobs"])
    assert all(value <= 0 for value in logprobs["token_logprobs"])


def test_the_offsets_of_a_stream_go_on_from_part_to_part() -> None:
    engine = ScriptedEngine("On", "e, ", Pause(0.05), "two", Pause(0.05), ".")
    with running(ChatModel(engine), ServerConfig(model_ids=("demo",))) as server:
        stream = server.client.post("/v1/completions", json={"prompt": "x", "logprobs": 1, "stream": True}).text
    events = [line.removeprefix("data: ") for line in stream.split("\n\n") if line.startswith("data: {")]
    logprobs = [chunk["logprobs"] for chunk in (json.loads(event)["choices"][0] for event in events)]
    offsets = [one["text_offset"] for one in logprobs if one is not None and one["tokens"]]
    assert len(offsets) > 1, "it came in parts"
    assert [place for part in offsets for place in part] == [0, 2, 5, 8]


def test_the_token_that_was_taken_is_among_the_alternatives(server: Server) -> None:
    for n_top in (0, 2):
        fields = {"logprobs": n_top, "temperature": 2, "top_k": 0, "top_p": 1, "seed": 1}
        found = complete(server, prompt=PROMPT, **fields)["choices"][0]["logprobs"]
        taken = list(zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True))
        assert all(top[token] == logprob for token, logprob, top in taken)
        assert {len(top) for *_, top in taken} == ({1} if n_top == 0 else {2, 3})
        if n_top:
            assert all(list(top)[-1] == token for token, _, top in taken if len(top) == 3)


def test_no_limit_is_minus_one_and_the_default_is_openais(server: Server) -> None:
    assert complete(server, prompt=PROMPT, max_tokens=-1)["usage"]["completion_tokens"] == 21
    assert complete(server, prompt=PROMPT, max_tokens=None)["usage"]["completion_tokens"] == 16


def test_a_grammar_holds(server: Server) -> None:
    assert complete(server, prompt="x", grammar='root ::= "a" "b"')["choices"][0]["text"] == "ab"


@pytest.mark.slow
def test_what_it_cannot_do_is_refused(server: Server) -> None:
    for fields, param in (
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "best_of": 3}, "best_of"),
        ({"prompt": "a", "echo": True, "logprobs": 1}, "echo"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [10**9]}, "prompt"),
        ({"prompt": ["a"] * 9}, "n"),
        ({"messages": []}, "messages"),
        ({"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options"),
        ({"prompt": "a", "n_predict": 5}, "n_predict"),
    ):
        response = server.client.post("/v1/completions", json=fields)
        assert response.status_code == 400, fields
        assert response.json()["error"]["param"] == param


def test_a_prompt_that_does_not_fit_is_the_field_prompt(server: Server) -> None:
    error = server.client.post("/v1/completions", json={"prompt": "word " * 5000}).json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")
    assert "your prompt resulted in" in error["message"]


def test_the_models_are_one_model_under_its_names(server: Server) -> None:
    data = server.client.get("/v1/models").json()["data"]
    assert [model["id"] for model in data] == [
        "demo",
        "step-3.5-flash",
        "stepfun/step-3.5-flash",
        "stepfun-ai/step-3.5-flash",
    ]
    assert all(model["root"] is None and model["context_length"] == 4096 for model in data)
    assert server.client.get("/v1/models/stepfun/step-3.5-flash").json() == data[2]
    assert server.client.get("/v1/models/claude-opus-4-8").json() == {**data[0], "id": "claude-opus-4-8"}


@pytest.mark.slow
def test_a_strict_server_has_no_other_models(serve: Serve) -> None:
    with serve(strict=True) as server:
        assert server.client.get("/v1/models/Demo.gguf").json()["id"] == "Demo.gguf"
        assert server.client.get("/v1/models/other").json()["error"]["code"] == "model_not_found"


def test_the_tokenizer_goes_both_ways(server: Server) -> None:
    ids = server.client.post("/tokenize", json={"text": "naïve 步"}).json()["tokens"]
    assert server.client.post("/detokenize", json={"tokens": ids}).json()["text"].endswith("naïve 步")
    messages = [{"role": "user", "content": "Hello"}]
    assert server.client.post("/tokenize", json={"messages": messages}).json()["count"] == 23
    assert server.client.post("/tokenize", json={}).status_code == 400
    assert server.client.post("/tokenize", json={"text": "a", "content": "a"}).status_code == 400
    assert server.client.post("/detokenize", json={"tokens": [-1]}).status_code == 400


@pytest.mark.slow
def test_the_tokenizer_does_what_llama_servers_does(server: Server, demo_gguf: Path) -> None:
    """bos in front or not, special tokens in the text or their text, tokens with their bytes."""
    tokenizer = llama_cpp.Llama(str(demo_gguf), vocab_only=True, verbose=False)
    text = "<|im_start|>user\nnaïve 步"
    for add in (False, True):
        for parse in (False, True):
            expected = tokenizer.tokenize(text.encode(), add_bos=add, special=parse)
            asked = {"add_special": add, "parse_special": parse}
            for name in ("content", "text"):
                found = server.client.post("/tokenize", json={name: text, **asked}).json()
                assert found["tokens"] == expected
    default = server.client.post("/tokenize", json={"content": text}).json()["tokens"]
    assert default == tokenizer.tokenize(text.encode(), add_bos=False, special=True)
    pieces = server.client.post("/tokenize", json={"content": text, "with_pieces": True}).json()["tokens"]
    assert [piece["id"] for piece in pieces] == default
    parts = [p["piece"].encode() if isinstance(p["piece"], str) else bytes(p["piece"]) for p in pieces]
    assert b"".join(parts).decode() == text
    assert any(isinstance(piece["piece"], list) for piece in pieces)
    assert server.client.post("/detokenize", json={"tokens": default}).json()["content"] == text
