"""stepgguf serve and bench as processes, as a user starts them."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from stepgguf.cli.main import main
from tests.conftest import INTERRUPTIBLE

pytestmark = pytest.mark.slow

STAND_IN = Path(__file__).parents[1] / "runtime" / "llama_server.py"


@contextmanager
def serving(demo_gguf: Path, *options: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and its URL, read from what it says when it is ready."""
    process = subprocess.Popen(
        [*INTERRUPTIBLE, "serve", str(demo_gguf), "--port", "0", "--threads", "1", *options],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        found = re.search(r"http://\S+?:\d+", line)
        assert found, line + process.stderr.read()
        transport = httpx.HTTPTransport(retries=20)  # it is bound, and listens in a moment
        with httpx.Client(transport=transport) as client:
            client.get(found[0] + "/health")
        yield process, found[0]
    finally:
        process.kill()
        process.communicate()


def ask(url: str, **headers: str) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": "How many 'r's are in the word strawberry?"}], "temperature": 0}
    return httpx.post(url + "/v1/chat/completions", json=body, headers=headers, timeout=30)


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_it_answers_and_ends_when_told(demo_gguf: Path, sign: signal.Signals) -> None:
    with serving(demo_gguf) as (process, url):
        assert ask(url).json()["choices"][0]["message"]["content"] == "There are 3 'r's."
        assert next(m["id"] for m in httpx.get(url + "/v1/models").json()["data"]) == "demo"
        process.send_signal(sign)
        _, log = process.communicate(timeout=20)
        assert process.returncode == 0
        assert "strawberry" not in log, "the log has what was asked"
        assert "42+50 tokens" in log


def test_the_key_comes_from_the_environment_and_is_never_shown(demo_gguf: Path) -> None:
    with serving(demo_gguf, STEPGGUF_API_KEY="s3cret") as (process, url):
        assert ask(url).status_code == 401
        assert ask(url, authorization="Bearer s3cret").status_code == 200
        process.send_signal(signal.SIGTERM)
        assert "s3cret" not in process.communicate(timeout=20)[1]


def test_other_machines_are_served_only_with_a_key(demo_gguf: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(demo_gguf), "--host", "0.0.0.0"]) == 2
    assert "can be reached from other machines" in " ".join(capfd.readouterr().err.split())


def test_it_names_the_addresses_at_which_others_reach_it(demo_gguf: Path) -> None:
    with serving(demo_gguf, "--host", "0.0.0.0", "--no-key") as (process, _):
        assert process.stderr is not None
        process.send_signal(signal.SIGTERM)
        told = re.findall(r"also at (http://\S+)", process.stderr.read())
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("198.51.100.1", 9))
        except OSError:
            pytest.skip("this machine has no network")
        assert any(urlsplit(url).hostname == probe.getsockname()[0] for url in told)
    assert all(urlsplit(url).hostname != "0.0.0.0" for url in told)


def test_names_and_strictness_are_options(demo_gguf: Path) -> None:
    with serving(demo_gguf, "--allowed-host", "spark.lan", "--allowed-host", "proxy.lan", "--strict") as (_, url):
        for name, status in (("spark.lan", 200), ("proxy.lan:8080", 200), ("evil.lan", 403)):
            assert httpx.get(url + "/v1/models", headers={"host": name}).status_code == status
        assert httpx.get(url + "/v1/models/gpt-9").status_code == 404


def test_a_taken_port_is_said_before_the_model_is_loaded(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", str(tmp_path / "absent.gguf"), "--port", str(port)]) == 1
    assert f"cannot listen on 127.0.0.1:{port}" in capfd.readouterr().err


def test_conversations_outlive_a_restart(demo_gguf: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    cached = []
    for _ in range(2):
        with serving(demo_gguf, "--cache-folder", str(folder)) as (process, url):
            text = "Please tell me: " + "and then " * 80 + "what is 347 + 286?"
            body = {"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 5}
            usage = httpx.post(url + "/v1/chat/completions", json=body, timeout=30).json()["usage"]
            cached.append(usage["prompt_tokens_details"]["cached_tokens"])
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=20)
    assert cached[0] == 0
    assert cached[1] > 80


def test_the_same_over_a_llama_server(demo_gguf: Path, tmp_path: Path) -> None:
    program = tmp_path / "llama-server"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{STAND_IN}" "$@"\n')
    program.chmod(0o755)
    with serving(demo_gguf, "--engine", f"llama-server={program}", "--ctx", "1024", "--parallel", "1") as (_, url):
        reply = ask(url).json()
        assert reply["choices"][0]["message"]["content"] == "There are 3 'r's."
        assert reply["choices"][0]["message"]["reasoning"].startswith("Looking for r.")
        assert reply["usage"]["completion_tokens_details"]["reasoning_tokens"] == 41


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--engine", "vllm"], "'vllm' is not an engine; give llama-cpp-python or llama-server"),
        (["--rpc", "192.168.7.2:50052"], "only a llama-server that is started here"),
        (["--api-key", ""], "the key is empty"),
        (["--allowed-host", "http://spark.lan:80"], "expected a name such as spark.lan"),
        (["--port", "70000"], "less than or equal to 65535"),
    ],
)
def test_what_cannot_be_is_said(
    demo_gguf: Path, capfd: pytest.CaptureFixture[str], options: list[str], text: str
) -> None:
    assert main(["serve", str(demo_gguf), "--port", "0", *options]) == 2
    assert text in re.sub(r"[\s│]+", " ", capfd.readouterr().err)


def test_bench_measures_depths_batches_and_drafts(demo_gguf: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = ["--depths", "0,600", "--batches", "1,2", "-n", "8", "--threads", "1", "-r", "2"]
    assert main(["bench", str(demo_gguf), *options, "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert [(r["depth"], r["batch"]) for r in report["speed"]] == [(0, 1), (0, 2), (600, 1), (600, 2)]
    assert all(r["prompt_tps"] > 0 and r["generation_tps"] > 0 for r in report["speed"])
    assert [len(r["drafted"]) for r in report["mtp"]] == [0, 1, 2, 3]
    assert report["mtp"][0]["tokens_per_step"] == pytest.approx(1, abs=0.05)
    assert report["mtp"][1]["tokens_per_step"] > 1
    assert all(r["prompt_tps_stdev"] > 0 and r["generation_tps_stdev"] > 0 for r in report["speed"])
    assert main(["bench", str(demo_gguf), "--depths", "zero"]) == 2


def test_bench_shows_each_row_when_it_is_measured(demo_gguf: Path) -> None:
    command = [sys.executable, "-m", "stepgguf", "bench", str(demo_gguf), "--depths", "0,256", "--batches", "1,2"]
    with subprocess.Popen(
        [*command, "-n", "64", "--threads", "1", "-q"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(3)]
        assert process.poll() is None, "three rows came, and it goes on"
        lines += process.stdout.readlines()
    spread = r"\d+\.\d ± \d+\.\d"
    assert all(re.match(rf"(0|256) +[12] +{spread} +{spread}$", line) for line in lines[1:5])
    assert re.match(rf"3 +\d\.\d\d +{spread} +\d\.\d\d +\d+% \d+% \d+%$", lines[-1])
