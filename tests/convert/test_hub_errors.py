"""What the Hub says no to, as a sentence and what to do; and HF_HUB_OFFLINE, which takes what the cache has."""

from __future__ import annotations

import traceback
from pathlib import Path

import huggingface_hub
import pytest

from stepgguf.cli.main import main
from stepgguf.errors import HubError
from tests.convert.hub_server import HUB_ID, Hub

pytestmark = pytest.mark.slow

ADDRESS = f"hf:{HUB_ID}"
TOKEN = "hf_" + "s3cret" * 5
GATED = {"X_Error_Code": "GatedRepo", "X_Error_Message": "Access is restricted."}
UNKNOWN = {"X_Error_Code": "RepoNotFound", "X_Error_Message": "Invalid username or password."}
WRONG = {"X_Error_Message": "Invalid credentials in Authorization header"}


@pytest.mark.parametrize(
    ("command", "status", "headers", "problem", "advice"),
    [
        ("inspect SRC", 401, GATED, "its owner asks for consent", "Accept its terms at {url}/" + HUB_ID),
        ("convert SRC x.gguf", 403, GATED, "its owner asks for consent", "or set HF_TOKEN."),
        ("quantize SRC x.gguf", 401, WRONG, "{url} does not accept the token that it was given", "that is valid"),
        ("plan SRC", 401, UNKNOWN, "there is no such model at {url}, or it is private", "If it is private: log in"),
        ("imatrix SRC -o x.gguf", 404, UNKNOWN, "there is no such model at {url}", "Check its name."),
        ("inspect SRC/x.gguf", 403, {}, "{url} answered 403 Forbidden", "Use the token of somebody who may read it"),
    ],
    ids=["gated", "gated to this account", "wrong token", "private", "not found", "forbidden"],
)
def test_a_refusal_says_what_to_do(
    hub: Hub,
    command: str,
    status: int,
    headers: dict[str, str],
    problem: str,
    advice: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.refusal = status, headers
    assert main([*command.replace("SRC", ADDRESS).split()]) == 1
    captured = capfd.readouterr()
    said = " ".join(captured.err.split())
    assert f"error: {ADDRESS}: {problem.format(url=hub.url)}" in said
    assert advice.format(url=hub.url) in said
    assert TOKEN not in captured.out + captured.err
    with pytest.raises(HubError) as caught:
        main(["inspect", ADDRESS, "--debug"])
    assert TOKEN not in "".join(traceback.format_exception(caught.value))


def test_a_revision_that_does_not_exist(hub: Hub, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", f"{ADDRESS}@my%2Fbranch"]) == 1
    said = " ".join(capfd.readouterr().err.split())
    assert f"error: {ADDRESS}@my%2Fbranch: there is no such revision hint: Give a branch, a tag or a commit" in said


def test_a_plain_id_says_what_to_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "x.gguf").touch()
    for command in (
        ["convert", HUB_ID, "out/"],
        ["quantize", HUB_ID, "out/"],
        ["inspect", HUB_ID],
        ["plan", HUB_ID],
        ["imatrix", HUB_ID, "-o", "i.gguf"],
    ):
        assert main(command) == 1
        assert f"Give hf:{HUB_ID} to read it from there" in " ".join(capfd.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_offline_the_cache_is_read(
    hub: Hub,
    repository: Path,
    out: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    command = ["convert", ADDRESS, str(out / "out.gguf"), "-t", "Q4_K_S", "-q"]
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    go_offline(monkeypatch, offline=True)
    assert main(command) == 1
    said = " ".join(capfd.readouterr().err.split())
    assert f"error: {ADDRESS}: HF_HUB_OFFLINE keeps from the network, and {tmp_path}/cache/models--" in said
    go_offline(monkeypatch, offline=False)
    hub.fault = lambda number: "416" if number > 40 else None
    assert main(command) == 1
    for path in repository.iterdir():
        huggingface_hub.HfApi().hf_hub_download(HUB_ID, path.name)
    go_offline(monkeypatch, offline=True)
    asked = hub.requests
    capfd.readouterr()
    assert main([*command, "--keep", str(out / "kept")]) == 1
    assert "Leave --keep out: the cache has the files" in " ".join(capfd.readouterr().err.split())
    assert main(command) == 0  # and goes on with what the network gave
    assert hub.requests == asked


def go_offline(monkeypatch: pytest.MonkeyPatch, *, offline: bool) -> None:
    """As HF_HUB_OFFLINE does in a new process."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
