"""Which errors are the request's, and which the server's."""

from __future__ import annotations

import pytest

from stepgguf.errors import GGUFError, RequestError, StepggufError, TemplateRefused
from stepgguf.server.problem import problem_of
from tests.server.conftest import Server


def branch(kind: type[StepggufError]) -> list[type[StepggufError]]:
    return [kind, *(kind for below in kind.__subclasses__() for kind in branch(below))]


@pytest.mark.parametrize("kind", branch(RequestError))
def test_an_error_of_the_request_is_a_400_with_its_field(kind: type[RequestError]) -> None:
    found = problem_of(kind("no", param="messages", hint="Ask otherwise."))
    assert (found.status, found.param, found.message) == (400, "messages", "no. Ask otherwise.")


@pytest.mark.parametrize("kind", branch(GGUFError))
def test_an_error_of_the_file_is_not_the_clients(kind: type[GGUFError]) -> None:
    found = problem_of(kind("a key is missing"))
    assert (found.status, found.param) == (500, None)
    assert found.headers == {"x-should-retry": "false"}, "it would fail again"


def test_a_template_that_refuses_messages_is_an_error_of_the_request() -> None:
    assert issubclass(TemplateRefused, RequestError)
    assert not issubclass(TemplateRefused, GGUFError)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/responses", "/v1/completions"])
def test_a_body_that_is_missing_is_called_so(server: Server, path: str) -> None:
    assert server.client.post(path).json()["error"]["message"] == "the body is missing"


def test_the_right_address_with_a_wrong_method_is_not_sent_elsewhere(server: Server) -> None:
    found = server.client.get("/v1/chat/completions")
    assert (found.status_code, found.headers["allow"]) == (405, "POST")
    assert "it is /v1/completions" not in found.json()["error"]["message"]
