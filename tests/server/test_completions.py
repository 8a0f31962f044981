"""Prompts as they are, the list of models, the tokenizer, and how the server is."""

from __future__ import annotations

import json

from tests.server.conftest import Server

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
    assert logprobs["text_offset"] == [0, 3, 8, 16] or len(logprobs["tokens"]) == 4
    assert all(len(top) == 2 for top in logprobs["top_logprobs"])
    assert all(value <= 0 for value in logprobs["token_logprobs"])


def test_a_grammar_holds(server: Server) -> None:
    assert complete(server, prompt="x", grammar='root ::= "a" "b"')["choices"][0]["text"] == "ab"


def test_what_it_cannot_do_is_refused(server: Server) -> None:
    for fields, param in (
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "best_of": 3}, "best_of"),
        ({"prompt": "a", "echo": True, "logprobs": 1}, "echo"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [10**9]}, "prompt"),
        ({"prompt": ["a"] * 9}, "n"),
        ({"messages": []}, "messages"),
    ):
        response = server.client.post("/v1/completions", json=fields)
        assert response.status_code == 400, fields
        assert response.json()["error"]["param"] == param


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
    assert server.client.get("/v1/models/other").json()["error"]["code"] == "model_not_found"


def test_the_tokenizer_goes_both_ways(server: Server) -> None:
    ids = server.client.post("/tokenize", json={"text": "naïve 步"}).json()["tokens"]
    assert server.client.post("/detokenize", json={"tokens": ids}).json()["text"].endswith("naïve 步")
    messages = [{"role": "user", "content": "Hello"}]
    assert server.client.post("/tokenize", json={"messages": messages}).json()["count"] == 23
    assert server.client.post("/tokenize", json={}).status_code == 400
    assert server.client.post("/detokenize", json={"tokens": [-1]}).status_code == 400
