"""A client of a federation: Flower's node, what starts its messages, the worker, kept going."""

from __future__ import annotations

import contextlib
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

from fedloom.deployment.calling import start_worker
from fedloom.deployment.children import Child, Family, end, free_port, only
from fedloom.deployment.door import Caller
from fedloom.deployment.homes import ClientHome, Joining, OwnFile
from fedloom.errors import ConnectionFailed
from fedloom.identity import read_key, require_current

STUCK = re.compile(rb"Ignoring message|Failed to receive message")
"""Said by Flower's node when a server goes away while a message is on its way from it. The message may be
answered all the same, by what had begun on it; the node sends that instead of the answer to the next
message, the answer to the next instead of the one after that, and never catches up."""


def join(
    home: ClientHome,
    server: str,
    *,
    key: Path,
    authority: Path | None,
    own: Path | None = None,
    ready: Callable[[Joining], None] = lambda joining: None,
) -> None:
    """Take part in a federation until told to stop (SIGTERM or SIGINT).

    Args:
        home: The client's folder.
        server: HOST:PORT of the server's door.
        key: The client's private key.
        authority: The federation's ca.pem; ``None`` for no TLS.
        own: The client's file.
        ready: Called once the server has let this client in.

    Raises:
        IdentityError: The key cannot be read, or is not let in; the authority has expired.
        ConnectionFailed: The server cannot be reached or is another one; or a client runs in the folder.
        SettingsError: The client's file has mistakes.
    """
    if own is not None:
        OwnFile.read(own)
    if authority is not None:
        require_current(authority)
    caller = Caller(server, read_key(key), authority.read_bytes() if authority else None)
    with only("client", home.lock):
        welcome = caller.knock()
        joining = Joining(
            door=server,
            number=welcome.number,
            key=str(key.resolve()),
            authority=str(authority.resolve()) if authority else None,
            own=str(own.resolve()) if own else None,
        )
        home.write_joining(joining)
        host = server.rpartition(":")[0]
        family = Family(_children(home, joining, f"{host}:{welcome.flower_port}"))
        _keep_going(home, caller, family, lambda: ready(joining))


def _keep_going(
    home: ClientHome, caller: Caller, family: Family, ready: Callable[[], None]
) -> None:
    """Keep a client's processes going until told to stop."""
    family.end_leftovers()
    stopping: list[int] = []
    for kind in (signal.SIGTERM, signal.SIGINT):
        signal.signal(kind, lambda number, frame: stopping.append(number))
    end_worker(home)  # it may know another key or file
    start_worker(home.path)
    ready()
    try:
        while not stopping:
            for child in family.children:
                if child.keep_alive():
                    with contextlib.suppress(
                        ConnectionFailed
                    ):  # but not that it is let in no longer
                        caller.knock()
            time.sleep(0.2)
    finally:
        family.stop()
        end_worker(home)


def take_part(
    home: Path,
    address: str,
    key: Path,
    authority: Path | None,
    own: Path | None,
    say: Callable[[str], object],
) -> None:
    """Take part in a federation until told to stop, and say under which number."""
    if authority is None:
        say(
            "warning: no TLS: everybody on the network can read along, and another server could pass "
            "for this one"
        )

    def ready(joining: Joining) -> None:
        say(f"joined {address} as client {joining.number}; folder {home}")

    join(ClientHome(home), address, key=key, authority=authority, own=own, ready=ready)


def leave(home: Path) -> int:
    """Tell the client in a folder to stop; return its process.

    Raises:
        ConnectionFailed: None runs there.
    """
    return end("client", ClientHome(home).lock)


def end_worker(home: ClientHome) -> None:
    """End the worker of a home, if it runs."""
    with contextlib.suppress(ConnectionFailed):
        end("worker", home.pid)


def _children(home: ClientHome, joining: Joining, flower: str) -> list[Child]:
    """Return Flower's node, and what starts a process for each of its messages."""
    port, logs = free_port(), home.path / "logs"
    if joining.authority is None:
        proof = ["--insecure"]
    else:
        proof = ["--root-certificates", joining.authority]
        proof += ["--auth-supernode-private-key", joining.key]
    node = [
        "flower-supernode",
        *proof,
        *("--isolation", "process"),
        *("--superlink", flower),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--node-config", f'fedloom-home="{home.path.resolve()}"'),
    ]
    starter = ["flower-superexec", "--insecure", "--runtime-api-address", f"127.0.0.1:{port}"]
    environment = {"FLWR_HOME": str((home.path / "flower").resolve())}
    return [
        Child(node, logs / "supernode.out", environment, stuck=STUCK),
        Child(starter, logs / "clientapp.out", environment),
    ]
