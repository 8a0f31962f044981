"""A stand-in for the Hugging Face Hub and the CDN behind it: two servers on the loopback that huggingface_hub talks to.

hub  /api/models/ORG/NAME[/revision/REV]      commit and files, or a refusal
     /ORG/NAME/resolve/COMMIT/FILE            small files; for LFS files a redirect to
cdn  /blobs/SHA256?signature=N                ranges, refused once the signature has expired
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import socket
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub.constants
import pytest

from stepgguf.convert.journal import RECORD_BYTES

HUB_ID = "stepfun-ai/Step-3.5-Flash"
STALL = 2.0  # seconds: longer than the read timeout of whoever is tested
# What an answer of the CDN may be in place of the bytes that were asked for.
FAULTS = "cut short longer shifted whole stall reset 403 408 429 500 503".split()

# The command in a process of its own, which commits as often as a small model needs it.
COMMAND = [
    sys.executable,
    "-c",
    "import sys, stepgguf.convert.pipeline as p, stepgguf.convert.sources.kept_file as k\n"
    "p.COMMIT_SECONDS = k.COMMIT_SECONDS = 0.02; k.PIECE = 2**16\n"
    "from stepgguf.cli.main import main; sys.exit(main(sys.argv[1:]))",
]

Fault = str | None


class Hub:
    """Serves the files of a folder as one repository. Its attributes may be changed while it runs.

    fault: asked at each range with its number, from 0: the fault to inject. injected: how often each was.
    """

    def __init__(self, folder: Path, commit: str = "1f" * 20, token: str | None = None) -> None:
        self.folder, self.commit, self.token = folder, commit, token
        self.refusal: tuple[int, dict[str, str]] | None = None
        self.fault: Callable[[int], Fault] = lambda number: None
        self.hub_fault: Callable[[str], Fault] = lambda path: None
        self.etag_suffix = ""
        self.signature, self.requests, self.ranges, self.range_bytes = 0, 0, 0, 0
        self.injected: Counter[str] = Counter()
        self.cdn_authorizations: set[str | None] = set()
        files = (path for path in folder.rglob("*") if path.is_file())
        self.digests = {str(path.relative_to(folder)): digest_of(path) for path in files}
        self.listed_digests: dict[str, str] = {}  # where they are not those of the files
        self.lock = threading.Lock()
        self.url = self.cdn_url = ""

    def next_fault(self) -> Fault:
        with self.lock:
            number, self.ranges = self.ranges, self.ranges + 1
        fault = self.fault(number)
        if fault:
            self.count(fault)
        return fault

    def count(self, fault: str) -> None:
        with self.lock:
            self.injected[fault] += 1

    def described(self) -> dict[str, object]:
        files = []
        for name, digest in sorted(self.digests.items()):
            size, digest = (self.folder / name).stat().st_size, self.listed_digests.get(name, digest)
            lfs = {"sha256": digest, "size": size, "pointerSize": 134}
            blob = "0" * 40 if is_lfs(name) else digest  # of an LFS file its pointer's
            files.append({"rfilename": name, "size": size, "blobId": blob} | ({"lfs": lfs} if is_lfs(name) else {}))
        return {"_id": "1", "id": HUB_ID, "sha": self.commit, "siblings": files, "tags": [], "private": False}


def is_lfs(name: str) -> bool:
    return name.endswith((".safetensors", ".gguf"))


def digest_of(path: Path) -> str:
    """What the Hub lists: of an LFS file its SHA-256, of others git's hash."""
    data = path.read_bytes()
    return (hashlib.sha256(data) if is_lfs(path.name) else hashlib.sha1(b"blob %d\0" % len(data) + data)).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub
    head = False

    def log_message(self, format: str, *args: object) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class HubHandler(Handler):
    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        hub.requests += 1
        if hub.token is not None and self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self.answer(401, X_Error_Code="GatedRepo", X_Error_Message="Access is restricted.")
        if hub.refusal is not None:
            return self.answer(hub.refusal[0], **hub.refusal[1])
        fault = hub.hub_fault(path)
        if fault:
            hub.count(f"hub {fault}")
            return self.answer(int(fault), Retry_After="0")
        if path.startswith("/api/"):
            return self.describe(path)
        repository, _, name = path.partition("/resolve/")
        revision, _, name = name.partition("/")
        if repository != f"/{HUB_ID}" or revision not in ("main", hub.commit) or name not in hub.digests:
            return self.answer(404, X_Error_Code="EntryNotFound")
        return self.resolve(name)

    def describe(self, path: str) -> None:
        model = f"/api/models/{HUB_ID}"
        if not path.startswith(model):
            return self.answer(404, X_Error_Code="RepoNotFound")
        revision = path.removeprefix(model).removeprefix("/revision/")
        if revision not in ("", "main", self.hub.commit):
            return self.answer(404, X_Error_Code="RevisionNotFound")
        return self.answer(200, json.dumps(self.hub.described()).encode(), Content_Type="application/json")

    def resolve(self, name: str) -> None:
        hub, digest = self.hub, self.hub.digests[name]
        linked = hub.listed_digests.get(name, digest)
        if not is_lfs(name):
            data = (hub.folder / name).read_bytes()
            return self.answer(200, data, ETag=f'"{digest}"', X_Repo_Commit=hub.commit)
        headers = {
            "Location": f"{hub.cdn_url}/blobs/{digest}?signature={hub.signature}",
            "X-Linked-ETag": f'"{linked}{hub.etag_suffix}"',
            "X-Linked-Size": str((hub.folder / name).stat().st_size),
            "X-Repo-Commit": hub.commit,
        }
        return self.answer(302, b"Found. Redirecting", **headers)


class CdnHandler(Handler):
    def do_GET(self) -> None:
        hub, url = self.hub, urlsplit(self.path)
        hub.cdn_authorizations.add(self.headers.get("Authorization"))
        if parse_qs(url.query)["signature"] != [str(hub.signature)]:
            hub.count("expired")
            return self.answer(403)
        digest = url.path.rpartition("/")[2]
        path = hub.folder / next(name for name, found in hub.digests.items() if found == digest)
        if "Range" not in self.headers:
            return self.answer(200, path.read_bytes())
        start, stop = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        etag, fault = f'"{digest[:32]}{hub.etag_suffix}"', hub.next_fault()
        if fault is None:
            with hub.lock:
                hub.range_bytes += stop + 1 - start
        return self.send_range(path, start, stop + 1, fault, etag)

    def send_range(self, path: Path, start: int, stop: int, fault: Fault, etag: str) -> None:
        length, size = stop - start, path.stat().st_size
        with path.open("rb") as file:
            file.seek(start)
            body = file.read(length)
        headers = {"ETag": etag, "Content-Range": f"bytes {start}-{stop - 1}/{size}"}
        match fault:
            case None:
                return self.answer(206, body, **headers)
            case "cut" | "stall":
                self.answer(206, body[: length // 2], **headers, **{"Content-Length": str(length)})
                if fault == "stall":
                    self.wfile.flush()
                    threading.Event().wait(STALL)
                self.close_connection = True
            case "short":  # says so, and is a byte less than what was asked for
                return self.answer(206, body[:-1], **headers)
            case "longer":
                self.send_response(206)
                for name, value in {**headers, "Transfer-Encoding": "chunked"}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(b"%x\r\n%s\r\n0\r\n\r\n" % (length + 5, body + b"12345"))
            case "shifted":
                headers["Content-Range"] = f"bytes {start + 1}-{stop}/{size}"
                return self.answer(206, body, **headers)
            case "whole":
                return self.answer(200, path.read_bytes(), ETag=etag)
            case "reset":
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
            case "429":
                return self.answer(429, Retry_After="0")
            case _:
                return self.answer(int(fault))
        return None


class QuietServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # the client went away, which is what is tested


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Run both servers; `hub.url` is the endpoint."""
    servers = [
        QuietServer(("127.0.0.1", 0), type(handler.__name__, (handler,), {"hub": hub}))
        for handler in (HubHandler, CdnHandler)
    ]
    hub.url, hub.cdn_url = (f"http://127.0.0.1:{server.server_port}" for server in servers)
    threads = [threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True) for server in servers]
    for thread in threads:
        thread.start()
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


def random_faults(seed: int, share: float, faults: list[str]) -> Callable[[int], Fault]:
    """A fault of these at a share of the ranges, the same ones for a seed."""

    def fault(number: int) -> Fault:
        rng = random.Random(f"{seed} {number}")
        return rng.choice(faults) if rng.random() < share else None

    return fault


# whom the Hub is for ----------------------------------------------------------------------------------------------


def set_endpoint(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """As HF_ENDPOINT does in a new process."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    template = "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + template)


def process_environment(hub: Hub, tmp_path: Path, **more: str) -> dict[str, str]:
    return {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        **more,
    }


def journaled(journal: Path) -> int:
    return len(journal.read_bytes().partition(b"\n")[2]) // RECORD_BYTES if journal.exists() else 0


def assert_same_files(folder: Path, expected: Path) -> None:
    names = sorted(path.name for path in expected.iterdir())
    assert sorted(path.name for path in folder.iterdir()) == names
    for name in names:
        assert (folder / name).read_bytes() == (expected / name).read_bytes(), name
