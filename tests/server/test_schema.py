"""The OpenAPI document: it is true, and what it allows and forbids never makes the server fail."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

from tests.server.conftest import Server

pytestmark = pytest.mark.slow

ROUTES = {
    "/v1/chat/completions": ["post"],
    "/v1/completions": ["post"],
    "/v1/responses": ["post"],
    "/v1/responses/input_tokens": ["post"],
    "/v1/responses/{id}": ["get", "delete"],
    "/v1/responses/{id}/input_items": ["get"],
    "/v1/responses/{id}/cancel": ["post"],
    "/v1/responses/{id}/end_reasoning": ["post"],
    "/v1/messages": ["post"],
    "/v1/messages/count_tokens": ["post"],
    "/v1/models": ["get"],
    "/v1/models/{id}": ["get"],
    "/tokenize": ["post"],
    "/detokenize": ["post"],
    "/health": ["get"],
    "/metrics": ["get"],
}


@pytest.fixture(scope="module")
def document(server: Server) -> dict[str, Any]:
    found: dict[str, Any] = server.client.get("/openapi.json").json()
    return found


@pytest.fixture(scope="module")
def described(server: Server) -> Any:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def test_it_lists_the_routes_and_how_they_refuse(document: dict[str, Any]) -> None:
    assert all(verb in document["paths"][path] for path, verbs in ROUTES.items() for verb in verbs)
    for path, verbs in document["paths"].items():
        error = "AnthropicError" if path.startswith("/v1/messages") else "OpenAIError"
        for verb in verbs.values():
            assert not {"422", "default"} & set(verb["responses"]), "each status is named, so that another is a failure"
            refusals = {status: answer for status, answer in verb["responses"].items() if status != "200"}
            assert {"401", "403", "500"} <= set(refusals)
            for answer in refusals.values():
                assert answer["content"]["application/json"]["schema"] == {"$ref": f"#/components/schemas/{error}"}


def test_fields_stand_in_the_order_of_their_use(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    chat = list(schemas["ChatBody"]["properties"])
    assert chat[:4] == ["messages", "model", "stream", "stream_options"]
    order = ["max_tokens", "tools", "temperature", "reasoning_effort", "response_format", "user", "store"]
    assert sorted(order, key=chat.index) == order
    assert list(schemas["CompletionBody"]["properties"])[:3] == ["model", "prompt", "stream"]
    assert list(schemas["ResponsesBody"]["properties"])[:2] == ["model", "input"]
    assert list(schemas["MessagesBody"]["properties"])[:3] == ["messages", "model", "max_tokens"]


def test_every_field_that_has_no_effect_says_why(document: dict[str, Any]) -> None:
    properties = document["components"]["schemas"]["ChatBody"]["properties"]
    without_effect = {name for name, field in properties.items() if "without effect" in field.get("description", "")}
    assert {"user", "metadata", "store", "service_tier", "provider"} <= without_effect
    assert not without_effect & {"temperature", "tools", "reasoning", "stop"}


@pytest.mark.parametrize("mode", list(GenerationMode))
@pytest.mark.parametrize(("path", "verb"), [(path, verb) for path, verbs in ROUTES.items() for verb in verbs])
def test_nothing_that_can_be_sent_makes_it_fail(described: Any, path: str, verb: str, mode: GenerationMode) -> None:
    """Positive: as the document allows. Negative: as it forbids."""

    @given(case=described[path][verb].as_strategy(generation_mode=mode))
    @settings(max_examples=20, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    def send(case: schemathesis.Case) -> None:
        if isinstance(case.body, dict) and mode is GenerationMode.POSITIVE:
            shorten(path, case.body)
        case.call_and_validate(checks=[not_a_server_error, response_schema_conformance, status_code_conformance])

    if mode is GenerationMode.POSITIVE or (verb == "post" and "{" not in path):  # without a body nothing is wrong
        send()


LIMITS = {
    "/v1/chat/completions": "max_completion_tokens",
    "/v1/completions": "max_tokens",
    "/v1/responses": "max_output_tokens",
    "/v1/messages": "max_tokens",
}


def shorten(path: str, body: dict[str, Any]) -> None:
    """What is valid should not run for long."""
    if path in LIMITS:
        body[LIMITS[path]] = 2
        body.pop("n", None)
