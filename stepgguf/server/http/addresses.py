"""The address that a server is bound to, and where it can be reached."""

from __future__ import annotations

import ipaddress
import socket
import threading
from collections.abc import Collection, Iterator
from contextlib import ExitStack, suppress

from stepgguf.errors import EngineError

PATIENCE_SECONDS = 1.0  # the names are only shown at the start, which should not wait for them
# Documentation's own networks (RFC 5737, RFC 3849): nothing is sent there, but the kernel chooses the address that a
# packet to the outside would come from.
OUTSIDE = {socket.AF_INET: "192.0.2.1", socket.AF_INET6: "2001:db8::1"}


def bind_socket(host: str, port: int) -> socket.socket:
    """Take the port, before a large file is loaded; connections are refused until the server listens.

    EngineError if it is taken, or the host is no address of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with ExitStack() as undo:
            listener = undo.enter_context(socket.socket(family, kind, protocol))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            undo.pop_all()
    except OSError as error:
        raise EngineError(f"cannot listen on {host}:{port}: {error.strerror}", hint="Choose another --port.") from error
    return listener


def reachable_urls(host: str, port: int) -> list[str]:
    """Return the URLs at which a server bound to the address `host` can be reached.

    If it stands for all addresses of the machine: loopback first, then those that others can use, then names.
    """
    address = ipaddress.ip_address(host.partition("%")[0])
    if not address.is_unspecified:
        return [_url(host, port)]
    families = (socket.AF_INET,) if address.version == 4 else (socket.AF_INET6, socket.AF_INET)
    own = [address for family in families for address in _outgoing_addresses(family)]
    return [_url(name, port) for name in ("127.0.0.1", *own, *_known_names(own))]


def _outgoing_addresses(family: socket.AddressFamily) -> Iterator[str]:
    """The machine's own address towards the outside, if there is a way there."""
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((OUTSIDE[family], 9))
            yield probe.getsockname()[0]
    except OSError:  # no route to the outside
        return


def _known_names(own: Collection[str]) -> list[str]:
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
