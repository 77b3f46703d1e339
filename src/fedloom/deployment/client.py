"""A client of a federation: what fetches Flower's messages, and the worker that answers them."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fedloom.audit import FILE, AuditLog
from fedloom.deployment.calling import LOG as WORKER_LOG
from fedloom.deployment.calling import ask_worker, start_worker
from fedloom.deployment.children import end, make_room, only
from fedloom.deployment.flower_node import FlowerNode
from fedloom.deployment.gateway_client import GatewayClient
from fedloom.deployment.homes import ClientHome, Joining, OwnFile
from fedloom.errors import AuditError, ConnectionFailed
from fedloom.identity import read_key, require_current


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
        server: HOST:PORT of the server's gateway.
        key: The client's private key.
        authority: The federation's ca.pem; ``None`` for no TLS.
        own: The client's file.
        ready: Called once the server has let this client in.

    Raises:
        AuditError: This client's own log does not hold together.
        IdentityError: The key cannot be read, or is not let in; the authority has expired.
        ConnectionFailed: The server cannot be reached or is another one; or a client runs in the folder.
        SettingsError: The client's file has mistakes.
    """
    policy = (OwnFile.read(own) if own is not None else OwnFile()).policy
    if authority is not None:
        require_current(authority)
    gateway = GatewayClient(server, read_key(key), authority.read_bytes() if authority else None)
    with only("client", home.lock):
        _require_whole(home.path / FILE)
        joining = Joining(
            gateway=server,
            number=gateway.register(),
            key=str(key.resolve()),
            authority=str(authority.resolve()) if authority else None,
            own=str(own.resolve()) if own else None,
        )
        home.write_joining(joining)
        _keep_going(home, gateway, policy.max_bytes, lambda: ready(joining))


def _require_whole(log: Path) -> None:
    """Check that what this client has written down so far holds together.

    Raises:
        AuditError: It does not; nobody would know what this client was asked.
    """
    try:
        AuditLog(log)
    except AuditError as error:
        raise AuditError(
            f"{error}. This client takes part again once that file is moved away, where it can still be "
            "looked at; then it begins a new one"
        ) from None


def _keep_going(
    home: ClientHome, gateway: GatewayClient, max_bytes: int, ready: Callable[[], None]
) -> None:
    """Answer messages of at most so many bytes until told to stop.

    Raises:
        IdentityError: The server does not let this client in any more.
    """
    stopping: list[int] = []
    for kind in (signal.SIGTERM, signal.SIGINT):
        signal.signal(kind, lambda number, frame: stopping.append(number))
    end_worker(home)  # it may know another key or file
    start_worker(home.path)
    node = FlowerNode(gateway, lambda envelope: ask_worker(home.path, envelope), max_bytes)
    ready()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(node.run)
        try:
            while not stopping and not running.done():
                make_room(home.path / WORKER_LOG)
                time.sleep(0.2)
        finally:
            node.stop()
            end_worker(home)  # who waits for its answer is woken
    running.result()


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
