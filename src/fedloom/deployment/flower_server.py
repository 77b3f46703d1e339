"""Starts Flower's server so that only its own user can connect to it.

It listens on this machine alone, behind the gateway. But any local process that reaches its Control and
Runtime interfaces could run code with the rights of its user, and they have no password: so connections
are accepted only from processes of the same user (or of root).

Run as ``python -m fedloom.deployment.flower_server ARGUMENT ...`` with the arguments of
``flower-superlink``.
"""

from __future__ import annotations

import asyncio
import os
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from fedloom.runs.parent_process import end_with_parent

CONNECTIONS = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
"""Where Linux lists TCP connections, with the user of each end."""


def owner(port: int, listening: int) -> int | None:
    """Return the id of the user who connected from a port of this machine, or ``None`` where unknown.

    Args:
        port: The connecting end.
        listening: The port that it connected to.
    """
    ends = f":{port:04X}", f":{listening:04X}"
    for path in CONNECTIONS:
        if path.is_file():
            for line in path.read_text().splitlines()[1:]:
                words = line.split()
                if words[1].endswith(ends[0]) and words[2].endswith(ends[1]):
                    return int(words[7])
    return None


class OwnUserProtocol(HttpToolsProtocol):
    """HTTP for processes of the same user; other connections are closed before a byte is read."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take a connection, or close it."""
        super().connection_made(transport)  # type: ignore[arg-type]
        peer, own = (transport.get_extra_info(name) for name in ("peername", "sockname"))
        if CONNECTIONS[0].is_file() and owner(peer[1], own[1]) not in (os.getuid(), 0):
            self.transport.abort()


def main() -> None:
    """Run Flower's server; its log does not name every request."""
    end_with_parent()
    from flwr.superlink.cli.flower_superlink import flower_superlink

    run: Any = uvicorn.run
    uvicorn.run = partial(run, http=OwnUserProtocol)
    flower_superlink()


if __name__ == "__main__":
    main()
