"""Every script and request that README and docs/ show is run, against the server of tests/server."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from stepgguf.demo import CHECKPOINT
from tests.docs.pages import ROOT, Block, all_blocks, commands
from tests.server.conftest import Server
from tests.server.conftest import chat_model as chat_model
from tests.server.conftest import serve as serve
from tests.server.conftest import server as server

pytestmark = pytest.mark.slow

ADDRESS = "http://127.0.0.1:8080"
CLIENTS = Path(__file__).parents[1] / "clients"  # where the packages for JavaScript are


def run(command: list[str], text: str, cwd: Path) -> str:
    done = subprocess.run(command, input=text, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("block", all_blocks("python"), ids=lambda block: block.name)
def test_a_python_script_prints_something(block: Block, server: Server, tmp_path: Path) -> None:
    (tmp_path / "Step-3.5-Flash").symlink_to(CHECKPOINT)
    assert run([sys.executable, "-"], block.text.replace(ADDRESS, server.url), tmp_path).strip()


@pytest.mark.parametrize("block", all_blocks("javascript"), ids=lambda block: block.name)
def test_a_javascript_script_prints_something(block: Block, server: Server) -> None:
    assert run(["node", "--input-type=module"], block.text.replace(ADDRESS, server.url), CLIENTS).strip()


REQUESTS = [block for block in all_blocks("sh") if any(words[0] == "curl" for words in commands(block))]


@pytest.mark.parametrize("block", REQUESTS, ids=lambda block: block.name)
def test_a_request_is_answered(block: Block, server: Server, tmp_path: Path) -> None:
    for words in commands(block):
        if words[0] == "curl":
            assert run([word.replace(ADDRESS, server.url) for word in [*words, "--fail-with-body"]], "", tmp_path)


@pytest.mark.parametrize("block", all_blocks("json"), ids=lambda block: block.name)
def test_what_is_shown_as_json_is_json(block: Block) -> None:
    json.loads(block.text)


def test_the_list_of_fields_is_of_today() -> None:
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import write_fields  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(ROOT / "docs"))
    assert write_fields.page() == (ROOT / "docs" / "fields.md").read_text(), "run python docs/write_fields.py"
