"""A file of a repository on the Hub, read by ranges over HTTP.

    GET /ORG/NAME/resolve/COMMIT/FILE   ->  302 with x-linked-etag, x-linked-size  ->  the CDN's signed address
    GET the signed address, Range       ->  206 with content-range, etag           ->  exactly the bytes asked for

The signed address is kept until it is refused (it expires), then asked for again. What an answer says of the file's
version is compared with the repository's listing each time: bytes of two versions are never mixed. Whatever else goes
wrong on the way is tried again (attempts.py), from the byte that came last.

The HTTP client is huggingface_hub's: its proxies and certificates, and connections that are kept and shared by threads.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from pathlib import Path
from threading import Event
from urllib.parse import urljoin, urlsplit

import httpx2
from huggingface_hub import get_session

from stepgguf.convert.sources.attempts import Attempts, PassingFailure
from stepgguf.errors import HubError

# Seconds. read: between two parts of a body, which a stall is known by.
TIMEOUT = httpx2.Timeout(connect=20.0, read=30.0, write=30.0, pool=None)
_MOST_REDIRECTS = 5
_EXPIRED = (401, 403, 404, 410)  # of a signed address; of the Hub's own they are final
_RATE_LIMIT = re.compile(r"\br=0;\s*t=(\d+)")  # requests that remain, seconds until there are more
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


@dataclass(frozen=True, slots=True)
class RemoteVersion:
    """Which file it is: its address on the Hub, the commit, its bytes, and the sha256 or git hash that is its ETag."""

    url: str
    commit: str
    size: int
    etag: str


class RemoteFile:
    """A file on the Hub. authorization: headers for the Hub alone. stop: set when nothing is to be tried any longer."""

    def __init__(self, path: Path, version: RemoteVersion, authorization: dict[str, str], stop: Event) -> None:
        self.path, self.size = path, version.size
        self.version = f"{version.size} {version.etag}"
        self._version, self._authorization, self._stop = version, authorization, stop
        self._signed_url: str | None = None
        self._etags: dict[str, str] = {}  # of each address, without its signature

    def read_at(self, into: bytearray | memoryview, offset: int, name: str) -> None:
        """HubError for what does not pass, naming the file, the bytes and what happened."""
        self._read(memoryview(into).cast("B"), offset, name)

    def prefetch_at(self, size: int, offset: int) -> None:
        """Nothing: read_ahead.BufferedFile does it."""

    def close(self) -> None:
        """Nothing: connections are shared."""

    def _read(self, rest: memoryview, offset: int, name: str) -> None:
        """Fill `rest`; after a failure from where it stopped."""
        attempts = Attempts(f"{self.path}: bytes {offset:,} to {offset + len(rest):,} ({name})", self._stop)
        while rest:
            try:
                for part in self._stream_range(offset, len(rest)):
                    rest[: len(part)] = part
                    rest, offset = rest[len(part) :], offset + len(part)
            except PassingFailure as failure:
                attempts.pause_after(failure)

    def _stream_range(self, offset: int, n: int) -> Iterator[bytes]:
        """The n bytes at `offset`, in parts. PassingFailure if they do not all come."""
        try:
            with self._open_range(offset, n) as response:
                for part in response.iter_raw():
                    if len(part) > n:
                        raise PassingFailure("the answer has more bytes than were asked for")
                    n -= len(part)
                    yield part
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise PassingFailure(describe_failure(error)) from error
        if n:
            raise PassingFailure(f"the answer ended {n:,} bytes early")

    @contextmanager
    def _open_range(self, offset: int, n: int) -> Iterator[httpx2.Response]:
        """The answer whose body is these bytes, behind the redirects."""
        url = self._signed_url or self._version.url
        headers = {"Range": f"bytes={offset}-{offset + n - 1}", "Accept-Encoding": "identity"}
        for _ in range(_MOST_REDIRECTS + 1):
            with get_session().stream(
                "GET", url, headers=headers | self._headers_for(url), timeout=TIMEOUT, follow_redirects=False
            ) as response:
                self._check_link(response.headers)
                if not response.has_redirect_location:
                    self._check_status(response, url)
                    self._check_range(response.headers, url, offset, n)
                    self._signed_url = url
                    yield response
                    return
                response.read()  # so that the connection is kept
                url = urljoin(url, response.headers["Location"])
        raise PassingFailure(f"more than {_MOST_REDIRECTS} redirects")

    def _headers_for(self, url: str) -> dict[str, str]:
        """The token goes to the Hub, and to nobody to whom it redirects."""
        here, hub = urlsplit(url), urlsplit(self._version.url)
        return self._authorization if (here.scheme, here.netloc) == (hub.scheme, hub.netloc) else {}

    def _check_link(self, headers: httpx2.Headers) -> None:
        """HubError if what the Hub says of the file, beside a redirect or the bytes, is another version's."""
        wanted = self._version
        found = {
            "X-Repo-Commit": wanted.commit,
            "X-Linked-Size": str(wanted.size),
            "X-Linked-ETag": wanted.etag,
        }
        for name, value in found.items():
            if name in headers and plain_etag(headers[name]) != value:
                raise self._has_changed(name, value, headers[name])

    def _check_status(self, response: httpx2.Response, url: str) -> None:
        """PassingFailure or HubError for an answer that is not a part of the file."""
        status = response.status_code
        if status == 206:
            return
        said = f"the server answered {status} {response.reason_phrase}".rstrip()
        if url != self._version.url and status in _EXPIRED:
            if self._signed_url == url:  # and no newer one, which another thread was given
                self._signed_url = None
            raise PassingFailure(f"{said}: the signed address has expired")
        if is_passing(status):
            raise PassingFailure(said, pause=asked_pause(response.headers))
        if status == 200:
            raise PassingFailure("the server sent the whole file and not the part that was asked for")
        hint = "Log in with `hf auth login`, or set HF_TOKEN." if status in (401, 403) else "Check the address."
        raise HubError(f"{self.path}: {said}", hint=hint)

    def _check_range(self, headers: httpx2.Headers, url: str, offset: int, n: int) -> None:
        """PassingFailure if other bytes come than were asked for, HubError if they are of another version."""
        place, etag = url.partition("?")[0], plain_etag(headers.get("ETag", ""))
        known = self._version.etag if url == self._version.url else self._etags.setdefault(place, etag)
        if etag and known and etag != known:
            raise self._has_changed("ETag", known, etag)
        said = headers.get("Content-Range", "nothing")
        match = _RANGE.fullmatch(said)
        if match is None or (int(match[1]), int(match[2])) != (offset, offset + n - 1):
            raise PassingFailure(f"the answer holds {said}, expected bytes {offset}-{offset + n - 1}")
        if match[3] not in ("*", str(self.size)):
            raise self._has_changed("size", str(self.size), match[3])
        if headers.get("Content-Length", str(n)) != str(n):
            raise PassingFailure(f"the answer has {headers['Content-Length']} bytes, expected {n}")

    def _has_changed(self, what: str, before: str, now: str) -> HubError:
        return HubError(
            f"{self.path}: the file has changed while it was read: its {what} was {before}, and is {now}",
            hint="Repeat the command; if it says that the source changed, start anew with --restart.",
        )


def is_passing(status: int) -> bool:
    """Whether a status may be another one at the next attempt."""
    return status in (408, 425, 429) or status >= 500


def plain_etag(text: str) -> str:
    """An ETag without its quotes."""
    return text.removeprefix("W/").strip('"')


def describe_failure(error: Exception) -> str:
    """What went wrong on the way, in words."""
    if isinstance(error, httpx2.TimeoutException):
        return "no answer came in time" if isinstance(error, httpx2.ConnectTimeout) else "the transfer stalled"
    return str(error) or type(error).__name__


def asked_pause(headers: Mapping[str, str]) -> float | None:
    """The seconds that a server asks for: in Retry-After, as a number or a date, or in the Hub's RateLimit."""
    limited = _RATE_LIMIT.search(headers.get("RateLimit", ""))
    text = limited[1] if limited else headers.get("Retry-After", "")
    if text.isdecimal():
        return float(text)
    try:
        date = parsedate_to_datetime(text)
    except ValueError:
        return None
    if date.tzinfo is None:
        date = date.replace(tzinfo=timezone.utc)
    return max(0.0, (date - datetime.now(timezone.utc)).total_seconds())
