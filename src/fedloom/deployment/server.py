"""The server of a federation: Flower's link, the door beside it, and what keeps them going."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from fedloom.audit import FILE, AuditLog
from fedloom.deployment.children import (
    LINK,
    Child,
    Family,
    end,
    flwr,
    require_free,
    wait_until_open,
)
from fedloom.deployment.door import Door, serve
from fedloom.deployment.homes import ServerHome, Serving
from fedloom.errors import ConnectionFailed, IdentityError, SettingsError
from fedloom.files import write_whole
from fedloom.identity import Member, require_current
from fedloom.settings import read_toml, write_toml

PORT, DOOR = 9092, 9093
REGISTERED = "registered.toml"


def start(
    home: ServerHome,
    *,
    host: str = "0.0.0.0",
    port: int = PORT,
    door: int = DOOR,
    insecure: bool = False,
    ready: Callable[[Serving], None] = lambda serving: None,
) -> None:
    """Serve until told to stop (SIGTERM or SIGINT).

    Args:
        home: The server's folder.
        host: Address to listen at.
        port: Of Flower.
        door: Of the door.
        insecure: Whether to do without TLS; nothing that travels is secret then.
        ready: Called once clients can join.

    Raises:
        IdentityError: A certificate is missing or has expired.
        ConnectionFailed: A port is taken, or Flower does not start.
    """
    if not insecure:
        require_current(home.certificate)
        require_current(home.authority)
    serving = Serving(host=host, port=port, door=door, insecure=insecure, pid=os.getpid())
    family = Family(_children(home, serving))
    family.end_leftovers()
    require_free(host, port)
    require_free(host, door)
    for folder in (home.path, home.flower, home.streams, home.requests):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    _configure(home, port, insecure)
    log = AuditLog(home.path / FILE)
    link = family.children[0]
    stopping: list[int] = []
    for kind in (signal.SIGTERM, signal.SIGINT):
        signal.signal(kind, lambda number, frame: stopping.append(number))
    own = Door(home.members, log.record, home.streams, port)
    certificate = None if insecure else (home.key.read_bytes(), home.certificate.read_bytes())
    opened = serve(own, f"{host}:{door}", certificate)
    try:
        link.keep_alive()
        wait_until_open(port, link)
        for number in under_way(home):  # who played them is gone; their folders can be resumed
            stop_run(home, number)
            log.record("ended_run", run=number)
        serving.write(home.started)
        log.record("started", port=port, door=door, tls=not insecure)
        registry = Registry(home, log, insecure=insecure)
        registry.follow()
        ready(serving)
        told = insecure
        while not stopping:
            for child in family.children:
                if child.keep_alive():
                    log.record("restarted", process=child.command[0])
            registry.follow()
            told = told or has_expired(home, log)
            time.sleep(0.2)
    finally:
        opened.stop(grace=None)
        family.stop()
        log.record("stopped")
        home.started.unlink(missing_ok=True)


def serve_federation(
    home: Path, host: str, port: int, door: int, *, insecure: bool, say: Callable[[str], object]
) -> None:
    """Serve until told to stop, and say when clients can join."""
    own = ServerHome(home)
    require_stopped(own)
    if insecure:
        say(
            "warning: no TLS and no authentication: everybody on the network can read and take part"
        )

    def ready(serving: Serving) -> None:
        say(f"clients can join at port {door}; Flower listens at port {port}; folder {home}")

    start(own, host=host, port=port, door=door, insecure=insecure, ready=ready)


def stop_server(home: Path) -> int:
    """Tell the server in a folder to stop; return its process."""
    return end(ServerHome(home).serving().pid)


def stop_run(home: ServerHome, number: str) -> None:
    """Have Flower end a run; every finished round of it is saved."""
    flwr(home.flower, "stop", number, LINK)


def under_way(home: ServerHome) -> list[str]:
    """Return Flower's numbers of the runs that are not over."""
    runs = flwr(home.flower, "ls", LINK)["runs"]
    return [str(r["run-id"]) for r in runs if not str(r["status"]).startswith("finished")]


def registered(home: ServerHome) -> dict[str, str]:
    """Return Flower's node of each public key that it was told of."""
    path = home.path / REGISTERED
    return read_toml(path) if path.exists() else {}


def _configure(home: ServerHome, port: int, insecure: bool) -> None:
    """Write the configuration by which Flower's command line finds the server."""
    address = f"localhost:{port}"
    link = {"address": address} | (
        {"insecure": True} if insecure else {"root-certificates": str(home.authority.resolve())}
    )
    table = {"superlink": {"default": LINK, LINK: link}}
    write_whole(home.flower / "config.toml", write_toml(table).encode())


def _children(home: ServerHome, serving: Serving) -> list[Child]:
    """Return the link, and what starts a process for each run."""
    logs, flower = home.path / "logs", home.flower
    path = home.path.resolve()
    if serving.insecure:
        server, client = ["--insecure"], ["--insecure"]
    else:
        client = ["--root-certificates", str(path / home.authority.name)]
        server = [
            "--ssl-ca-certfile",
            str(path / home.authority.name),
            "--ssl-certfile",
            str(path / home.certificate.name),
            "--ssl-keyfile",
            str(path / home.key.name),
            "--enable-supernode-auth",
        ]
    link = [
        "flower-superlink",
        *server,
        *("--isolation", "process"),
        *("--host", serving.host, "--port", str(serving.port)),
        *("--database", str(path / "flower.db")),
        *("--log-file", str(logs.resolve() / "flower-superlink.log")),
        "--disable-runtime-dependency-installation",
    ]
    starter = [
        "flower-superexec",
        *client,
        *("--runtime-api-address", f"localhost:{serving.port}"),
    ]
    environment = {"FLWR_HOME": str(flower.resolve())}
    return [
        Child(link, logs / "superlink.out", environment),
        Child(starter, logs / "serverapp.out", environment),
    ]


class Registry:
    """Tells Flower whom we let in, as often as that changes."""

    def __init__(self, home: ServerHome, log: AuditLog, *, insecure: bool) -> None:
        self.home, self.log, self.insecure = home, log, insecure
        self.path = home.path / REGISTERED
        self.nodes = registered(home)
        self._seen: list[Member] | None = None

    def follow(self) -> None:
        """Register who was let in and remove who was revoked since the last call."""
        members = self.home.members().members
        if self.insecure or members == self._seen:
            return
        for number, member in enumerate(members):
            if member.revoked and member.key in self.nodes:
                flwr(self.home.flower, "supernode", "unregister", self.nodes.pop(member.key), LINK)
                self.log.record("revoked", client=number, name=member.name)
            elif not member.revoked and member.key not in self.nodes:
                public = self.home.path / f"client-{number:04d}.pub"
                write_whole(public, f"{member.key}\n".encode(), 0o644)
                found = flwr(
                    self.home.flower,
                    "supernode",
                    "register",
                    str(public),
                    LINK,
                    "--name",
                    member.name,
                )
                self.nodes[member.key] = str(found["node-id"])
                self.log.record("allowed", client=number, name=member.name)
        write_whole(self.path, write_toml(self.nodes).encode())
        self._seen = members


def has_expired(home: ServerHome, log: AuditLog) -> bool:
    """Return whether the certificate is in force no longer: clients turn away, and the log says why."""
    try:
        require_current(home.certificate)
    except IdentityError as error:
        log.record("expired", reason=str(error))
        return True
    return False


def require_stopped(home: ServerHome) -> None:
    """Check that no server runs in a home.

    Raises:
        SettingsError: One does.
    """
    try:
        serving = home.serving()
        os.kill(serving.pid, 0)
    except (SettingsError, ProcessLookupError):
        return
    raise ConnectionFailed(f"a server runs in {home.path} already, as process {serving.pid}")
