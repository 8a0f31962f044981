"""The addresses that a server names."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit

from stepgguf.server.http.addresses import reachable_urls


def test_every_address_that_is_named_works() -> None:
    for family, host in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::"), (socket.AF_INET, "127.0.0.1")):
        with socket.create_server((host, 0), family=family, dualstack_ipv6=family == socket.AF_INET6) as listener:
            urls = reachable_urls(*listener.getsockname()[:2])
            assert urls
            for url in urls:
                socket.create_connection((urlsplit(url).hostname or "", urlsplit(url).port or 0), timeout=5).close()
