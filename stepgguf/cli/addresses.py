"""Where a server that is bound to an address can be reached."""

from __future__ import annotations

import ipaddress
import socket
import threading
from collections.abc import Collection, Iterator
from contextlib import suppress

PATIENCE_SECONDS = 1.0
# Documentation's own networks (RFC 5737, RFC 3849): nothing is sent there, but the kernel chooses the address that a
# packet to the outside would come from.
OUTSIDE = {socket.AF_INET: "192.0.2.1", socket.AF_INET6: "2001:db8::1"}


def reachable(host: str, port: int) -> list[str]:
    """URLs. host: the address that is bound. If it stands for all of the machine's: loopback, then what others can use,
    then names."""
    address = ipaddress.ip_address(host.partition("%")[0])
    if not address.is_unspecified:
        return [_url(host, port)]
    families = (socket.AF_INET,) if address.version == 4 else (socket.AF_INET6, socket.AF_INET)
    own = [one for family in families for one in _outgoing(family)]
    return [_url(one, port) for one in ("127.0.0.1", *own, *_names(own))]


def _outgoing(family: socket.AddressFamily) -> Iterator[str]:
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((OUTSIDE[family], 9))
            yield probe.getsockname()[0]
    except OSError:  # no route to the outside
        return


def _names(own: Collection[str]) -> list[str]:
    """Names that stand for one of these addresses, as far as that is known within PATIENCE_SECONDS."""
    found: list[str] = []
    host = socket.gethostname()

    def look() -> None:
        for name in dict.fromkeys((host, f"{host.partition('.')[0]}.local")):
            with suppress(OSError):
                if any(address[0] in own for *_, address in socket.getaddrinfo(name, None)):
                    found.append(name)

    looking = threading.Thread(target=look, daemon=True)  # a resolver may take its time to give up
    looking.start()
    looking.join(PATIENCE_SECONDS)
    return list(found)


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
