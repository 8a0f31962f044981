"""openai and Vercel's ai for JavaScript: the scripts beside this file, run by node, report what they found as JSON."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.clients.conftest import COUNTED, FORECAST, LETTERS, RESULT, THINKING, TOOL, WEATHER, Count, user
from tests.server.conftest import Server
from tests.server.test_stream import endless

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent


@pytest.fixture(scope="module", autouse=True)
def _installed() -> None:
    if shutil.which("node") is None:
        pytest.fail("there is no `node`: install Node.js 20 or newer, then run `make install`")
    if not all((HERE / "node_modules" / name).is_dir() for name in ("openai", "ai")):
        pytest.fail("the JavaScript clients are not installed: run `make install`")


def command(server: Server, script: str, *options: str) -> list[str]:
    return ["node", str(HERE / script), f"{server.url}/v1", *options]


def node(server: Server, script: str, *options: str) -> Any:
    done = subprocess.run(command(server, script, *options), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_stream_has_thinking_then_text(server: Server) -> None:
    assert node(server, "stream.mjs", LETTERS) == {"reasoning": THINKING, "content": COUNTED, "reasons": ["stop"]}


def test_its_loop_calls_a_tool_and_uses_the_result(server: Server) -> None:
    call = ["get_weather", {"city": "Paris"}]
    found = node(server, "tools.mjs", WEATHER, RESULT, json.dumps(TOOL))
    assert found == {"called": [call, call], "whole": FORECAST, "streamed": FORECAST}


def test_an_answer_keeps_to_a_schema(server: Server) -> None:
    found = node(server, "schema.mjs", LETTERS, json.dumps(Count.model_json_schema()))
    assert Count.model_validate(found).count == 3


@pytest.mark.parametrize(
    ("fields", "kind", "status", "code", "param"),
    [
        ({"temperature": 9}, "BadRequestError", 400, "invalid_request", "temperature"),
        ({"messages": [user("a " * 5000)]}, "BadRequestError", 400, "context_length_exceeded", "messages"),
        ({"model": "m" * 300}, "NotFoundError", 404, "model_not_found", "model"),
    ],
    ids=["field", "length", "model"],
)
def test_an_error_has_its_class_and_the_id_of_its_request(
    server: Server, fields: Any, kind: str, status: int, code: str, param: str
) -> None:
    found = node(server, "failure.mjs", json.dumps(fields))
    assert (found["kind"], found["status"], found["code"], found["param"]) == (kind, status, code, param)
    assert found["requestID"]


def test_an_engine_that_dies_in_a_stream_is_an_error(dying: Server) -> None:
    found = node(dying, "failure.mjs", "{}")
    assert found["kind"] == "APIError"
    assert "it broke" in found["message"]


def test_an_abort_controller_frees_the_slot(server: Server) -> None:
    """The process lives on while this looks: it is the abort, not its end, that closes the connection."""
    script = command(server, "abort.mjs", endless(server).decode())
    with subprocess.Popen(script, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as leaving:
        assert leaving.stdin
        assert leaving.stdout
        assert json.loads(leaving.stdout.readline()) == {"aborted": True}
        assert server.idle_within(2)
        assert leaving.poll() is None
        leaving.stdin.close()
        assert leaving.wait(20) == 0


def test_vercels_default_provider_sends_back_the_ids_of_items(server: Server) -> None:
    found = node(server, "vercel.mjs", WEATHER, RESULT, json.dumps(TOOL), LETTERS)
    assert found["texts"] == [FORECAST, FORECAST, COUNTED, COUNTED]
    assert found["called"] == [{"city": "Paris"}] * 2
    assert found["steps"] == ["tool-calls", "stop"]
    assert found["referred"]
    called = ["item_reference", "function_call", "function_call_output"]
    assert found["sent"] == ["user", *called, "item_reference", "item_reference", "user"]
