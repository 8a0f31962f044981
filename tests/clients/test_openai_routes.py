"""openai-python: models, completions, and the classes of its errors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.clients.conftest import user
from tests.server.conftest import MODEL_ID, Serve, Server

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_models_are_listed_and_found_also_under_ids_with_a_slash(client: openai.OpenAI) -> None:
    ids = [model.id for model in client.models.list()]
    assert ids == [MODEL_ID, "step-3.5-flash", "stepfun/step-3.5-flash", "stepfun-ai/step-3.5-flash"]
    assert [client.models.retrieve(id).id for id in ids] == ids
    assert client.models.retrieve("gpt/4").id == "gpt/4"


def test_a_strict_server_has_no_other_models(serve: Serve) -> None:
    with serve(strict=True) as server, openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        assert client.models.retrieve("stepfun-ai/Step-3.5-Flash").context_length == 4096  # type: ignore[attr-defined]
        with pytest.raises(openai.NotFoundError, match="there is no model 'gpt/4'"):
            client.models.retrieve("gpt/4")
        with pytest.raises(openai.NotFoundError) as caught:
            client.chat.completions.create(model="gpt-4", messages=[user("Hello")])
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_a_prompt_goes_on_whole_and_streamed(client: openai.OpenAI) -> None:
    asked: Any = {"model": "demo", "prompt": "<|im_start|>user\nHello<|im_end|>\n", "temperature": 0, "max_tokens": 8}
    whole = client.completions.create(**asked)
    assert whole.choices[0].text
    assert whole.usage
    assert whole.usage.completion_tokens <= 8
    streamed = "".join(chunk.choices[0].text for chunk in client.completions.create(stream=True, **asked))
    assert streamed == whole.choices[0].text


def test_a_wrong_key_is_an_authentication_error(serve: Serve) -> None:
    with serve(api_key="right") as server, openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong") as wrong:
        with pytest.raises(openai.AuthenticationError) as caught:
            wrong.models.list()
        assert caught.value.code == "invalid_api_key"
        assert caught.value.type == "authentication_error"
        assert wrong.with_options(api_key="right").models.list().data


@pytest.mark.parametrize(
    ("fields", "kind", "code", "param"),
    [
        ({"temperature": 9}, openai.BadRequestError, "invalid_request", "temperature"),
        ({"messages": [{"role": "king"}]}, openai.BadRequestError, "invalid_request", "messages[0].role"),
        ({"extra_body": {"temprature": 0}}, openai.BadRequestError, "invalid_request", "temprature"),
        ({"messages": [user("a " * 5000)]}, openai.BadRequestError, "context_length_exceeded", "messages"),
        ({"extra_body": {"n_predict": 5}}, openai.BadRequestError, "invalid_request", "n_predict"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("stream", [False, True])
def test_an_error_has_its_class_and_names_the_field(
    client: openai.OpenAI, fields: Any, kind: type[openai.APIStatusError], code: str, param: str, stream: bool
) -> None:
    with pytest.raises(kind) as caught:
        client.chat.completions.create(**{"model": "demo", "messages": [user("Hello")], "stream": stream, **fields})
    error = caught.value
    assert (error.code, error.param, error.type) == (code, param, "invalid_request_error")
    assert error.request_id
    assert error.request_id == error.body["request_id"]  # type: ignore[index]
