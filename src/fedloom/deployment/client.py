"""A client of a federation: it fetches Flower's messages, and its worker answers them."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec

from fedloom.deployment.client_file import OwnFile
from fedloom.deployment.flower_node import FlowerNode
from fedloom.deployment.folders import ClientFolder, Registration
from fedloom.deployment.gateway_client import Card, GatewayClient, split_address
from fedloom.deployment.policy import PolicySettings
from fedloom.deployment.processes import end, make_room, only
from fedloom.deployment.proxy import find_proxy
from fedloom.deployment.worker_socket import LOG as WORKER_LOG
from fedloom.deployment.worker_socket import ask_worker, start_worker
from fedloom.errors import AuditError, ConnectionFailed
from fedloom.security.audit_log import FILE, AuditLog
from fedloom.security.certificates import require_current
from fedloom.security.keys import read_key
from fedloom.storage.files import make_private

AGAIN = 1.0, 60.0
"""Seconds until the next attempt to reach the server at the start: at first, and at most."""


def join(
    client_folder: ClientFolder,
    server: str,
    *,
    key: Path,
    authority: Path | None,
    own: Path | None = None,
    ready: Callable[[Registration], None] = lambda registration: None,
    say: Callable[[str], object] = lambda text: None,
) -> None:
    """Take part in a federation until stopped (SIGTERM or SIGINT).

    The client waits for a server that cannot be reached, also at the start: this machine may have booted
    first.

    Args:
        client_folder: The client's folder.
        server: HOST:PORT of the server's gateway.
        key: The client's private key.
        authority: The federation's ca.pem; ``None`` for no TLS.
        own: The client's file.
        ready: Called once the server has admitted this client.
        say: Called with texts: the proxy, and the server that it waits for.

    Raises:
        AuditError: This client's own log is damaged.
        IdentityError: The key cannot be read, or is not allowed; the authority has expired; the server is
            another one, or has another protocol version.
        ConnectionFailed: A client runs in the folder.
        SettingsError: The client's file has mistakes, the server's address is none, or
            the environment names a proxy that cannot be used.
    """
    proxy = find_proxy(*split_address(server))
    if proxy is not None:
        say(f"connecting to {server} through the proxy at {proxy}")
    policy, content, own_key = _means(key, authority, own)
    stopping = threading.Event()
    for kind in (signal.SIGTERM, signal.SIGINT):
        signal.signal(kind, lambda number, frame: stopping.set())
    with only("client", client_folder.lock):
        _require_whole(client_folder.path / FILE)
        gateway = GatewayClient(server, own_key, content, client_folder.id)
        card = _registered(gateway, stopping, say)
        if card is None:
            return
        registration = _registration(server, card, key, authority, own)
        client_folder.write_registration(registration)
        node = FlowerNode(
            gateway,
            lambda envelope: ask_worker(client_folder.path, envelope),
            policy.max_bytes,
            say,
        )
        _keep_going(client_folder, node, stopping, lambda: ready(registration))


def _registration(
    server: str, card: Card, key: Path, authority: Path | None, own: Path | None
) -> Registration:
    """Return what a client that is admitted writes down for its worker and for other commands."""
    return Registration(
        gateway=server,
        number=card.number,
        name=card.name,
        key=str(key.resolve()),
        authority=str(authority.resolve()) if authority else None,
        own=str(own.resolve()) if own else None,
    )


def _means(
    key: Path, authority: Path | None, own: Path | None
) -> tuple[PolicySettings, bytes | None, ec.EllipticCurvePrivateKey]:
    """Return the policy of a client's file, the federation's authority and the client's key.

    Raises:
        IdentityError: The key or the authority cannot be read, or the authority has expired.
        SettingsError: The file has mistakes.
    """
    policy = (OwnFile.read(own) if own is not None else OwnFile()).policy
    if authority is not None:
        require_current(authority)
    return policy, authority.read_bytes() if authority else None, read_key(key)


def _registered(
    gateway: GatewayClient, stopping: threading.Event, say: Callable[[str], object]
) -> Card | None:
    """Return the server's registration of this client; ``None`` where it is stopped before.

    Raises:
        IdentityError: The server does not admit this client, or is another server.
    """
    pause, said = AGAIN[0], ""
    while not stopping.is_set():
        try:
            return gateway.register()
        except ConnectionFailed as error:
            if str(error) != said:
                said = str(error)
                say(f"{said}; trying again")
            stopping.wait(pause)
            pause = min(2 * pause, AGAIN[1])
    return None


def _require_whole(log: Path) -> None:
    """Check that this client's audit log is intact.

    Raises:
        AuditError: It is damaged, so there is no proof of earlier requests.
    """
    try:
        AuditLog(log)
    except AuditError as error:
        raise AuditError(
            f"{error}. Move that file to another folder, where it can still be examined; then this "
            "client takes part again with a new log"
        ) from None


def _keep_going(
    client_folder: ClientFolder,
    node: FlowerNode,
    stopping: threading.Event,
    ready: Callable[[], None],
) -> None:
    """Answer messages until stopped."""
    end_worker(client_folder)  # it may have another key or file
    start_worker(client_folder.path)
    ready()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(node.run)
        try:
            while not stopping.wait(0.2) and not running.done():
                make_room(client_folder.path / WORKER_LOG)
        finally:
            node.stop()
            end_worker(client_folder)  # threads that wait for its answer are woken
    running.result()


def take_part(
    client_folder: Path,
    address: str,
    key: Path,
    authority: Path | None,
    own: Path | None,
    say: Callable[[str], object],
) -> None:
    """Take part in a federation until stopped, and print the member's number."""
    os.umask(0o077)
    find_proxy(*split_address(address))
    _means(key, authority, own)  # a mistake must not leave a folder behind
    if make_private(client_folder):
        say(f"{client_folder} could be read by other users of this machine; it is private now")
    if authority is None:
        say(
            "warning: no TLS: everybody on the network can read the traffic, and another server could "
            "pass "
            "for this one"
        )

    def ready(registration: Registration) -> None:
        say(
            f"joined {address} as {registration.name}, member {registration.number}; folder "
            f"{client_folder}"
        )

    join(
        ClientFolder(client_folder),
        address,
        key=key,
        authority=authority,
        own=own,
        ready=ready,
        say=say,
    )


def leave(client_folder: Path) -> int:
    """Stop the client of a folder; return its process id.

    Raises:
        ConnectionFailed: None runs there.
    """
    return end("client", ClientFolder(client_folder).lock)


def end_worker(client_folder: ClientFolder) -> None:
    """End the worker of a client's folder, if it runs."""
    with contextlib.suppress(ConnectionFailed):
        end("worker", client_folder.pid)
