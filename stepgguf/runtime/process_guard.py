"""What a server that we start needs: a port, and a guard that kills it when we are gone.

A shell waits on a pipe that only we hold open: when it closes, because we ended or were killed, the shell kills the
server. So 100 GB are never left behind.
"""

from __future__ import annotations

import socket
import subprocess

_SCRIPT = 'read -r _; kill -KILL -"$0"'  # "$0" is the process group


class ProcessGuard:
    """Kills a process group when this process is gone, whatever ended it. The group's first process has its id."""

    def __init__(self, group: int) -> None:
        # A process and not a thread: it must outlive us by a moment, also if we are killed.
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", _SCRIPT, str(group)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def end(self) -> None:
        """Stop guarding, once the group has ended."""
        assert self._process.stdin is not None
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()


def free_port() -> int:
    """Return a port of this machine that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
