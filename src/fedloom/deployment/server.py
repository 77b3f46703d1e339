"""The server of a federation: the gateway, Flower's server behind it, and what keeps them going."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import ssl
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from fedloom.audit import FILE, AuditLog, Limited, unheard
from fedloom.deployment.children import (
    LINK,
    Child,
    Family,
    address,
    end,
    flwr,
    free_port,
    only,
    program,
    reachable,
    require_free,
    wait_until_open,
)
from fedloom.deployment.exposure import require_unexposed
from fedloom.deployment.fleet import Upstream
from fedloom.deployment.gateway import Gateway, GatewaySettings
from fedloom.deployment.homes import ServerHome, Serving
from fedloom.deployment.offences import FILE as OFFENCES
from fedloom.deployment.offences import OffenceLog
from fedloom.engines.frames import connect, write_frame
from fedloom.errors import ConnectionFailed, FedloomError, IdentityError, OffenceKind, OutputError
from fedloom.files import write_whole
from fedloom.identity import (
    CA,
    CERTIFICATE,
    CLIENTS,
    KEY,
    Member,
    hosts_of,
    make_authority,
    require_current,
    stamp_of,
)
from fedloom.offences import Offence, one_line
from fedloom.settings import read_toml, write_toml

PORT = 9092
RUN_PATTERN = "[0-9a-f]" * 32
"""Names of the sockets of runs."""

HERE = "127.0.0.1"
"""Where Flower's server listens: on this machine alone."""

REGISTERED, DATABASE = "registered.toml", "flower.db"

RETRY = 5.0
"""Seconds before Flower is told again what it could not be told."""

INTERNAL = 3650
"""Days that the certificates are good for by which Flower's processes on this machine know each other;
the server's is made anew at each start."""

TURN = 5e-4
"""Seconds after which a thread of the server gives way to another that waits: what members send is passed
on while strangers' handshakes are worked on, and would wait ten times as long by default."""

CHECK = 60.0
"""Seconds between looks at the certificate's last day."""


def start(
    home: ServerHome,
    *,
    host: str = "0.0.0.0",
    port: int = PORT,
    insecure: bool = False,
    ready: Callable[[Serving], None] = lambda serving: None,
) -> None:
    """Serve until told to stop (SIGTERM or SIGINT).

    Args:
        home: The server's folder.
        host: Address to listen at.
        port: Of the gateway.
        insecure: Whether to do without TLS: what travels can be read then, and nothing proves to a
            client that this is its server; keys of clients are asked for all the same.
        ready: Called once clients can join.

    Raises:
        IdentityError: A certificate is missing, has expired, or does not name the host.
        ConnectionFailed: A server runs in the folder, a port is taken, or Flower does not start.
    """
    if not insecure:
        require_current(home.certificate)
        require_current(home.authority)
        require_named(home.certificate, reachable(host))
    serving = Serving(host=host, port=port, flower=free_port(), insecure=insecure, pid=os.getpid())
    with only("server", home.lock):
        _serve(home, serving, ready)


def _serve(home: ServerHome, serving: Serving, ready: Callable[[Serving], None]) -> None:
    """Serve as the only one in a home."""
    host, port, insecure = serving.host, serving.port, serving.insecure
    settings = GatewaySettings.read(home.settings)
    family = Family(_children(home, serving))
    family.end_leftovers()
    require_free(host, port)
    for folder in (home.path, home.flower, home.streams, home.requests):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    _configure(home, serving)
    log = AuditLog(home.path / FILE)
    link = family.children[0]
    stopping: list[int] = []
    for kind in (signal.SIGTERM, signal.SIGINT):
        signal.signal(kind, lambda number, frame: stopping.append(number))
    raise_limit_of_descriptors()
    sys.setswitchinterval(TURN)
    context = ssl.create_default_context(cafile=str(home.flower / CA))
    database = home.path.resolve() / DATABASE
    upstream = Upstream(HERE, serving.flower, context, database, settings.flower_bytes)
    gateway = Gateway(
        home.members,
        log.record,
        home.streams,
        upstream,
        settings,
        partial(report_offence, home, OffenceLog(home.path / OFFENCES)),
        lambda: stamp_of(home.path / CLIENTS),
    )
    gateway.note = Limited(unheard)  # the next strangers are we ourselves
    gateway.listen(host, port, None if insecure else (home.certificate, home.key))
    try:
        link.keep_alive()
        wait_until_open(HERE, serving.flower, link)
        require_unexposed(reachable(host), port, tls=not insecure, private=serving.flower)
        gateway.note = Limited(log.record)
        for number in under_way(home):  # who played them is gone; their folders can be resumed
            stop_run(home, number)
            log.record("ended_run", run=number)
        for leftover in home.streams.iterdir():  # of runs that were killed
            leftover.unlink(missing_ok=True)
        serving.write(home.started)
        log.record("started", port=port, tls=not insecure)
        registry = Registry(home, log)
        expiry = Expiry(home, log, insecure=insecure)
        registry.follow()
        ready(serving)
        while not stopping:
            for child in family.children:
                if child.keep_alive():
                    log.record("restarted", process=child.name)
            registry.keep_following()
            gateway.follow()
            expiry.look()
            time.sleep(0.2)
    finally:
        gateway.stop()
        family.stop()
        log.record("stopped")
        home.started.unlink(missing_ok=True)


def report_offence(
    home: ServerHome, log: OffenceLog, client: int, kind: OffenceKind, reason: str
) -> None:
    """Have what a client got wrong at the gateway count: in the run under way, or in the log alone."""
    told, greeting = False, {"client": client, "offence": kind, "reason": one_line(reason)}
    for path in home.streams.glob(RUN_PATTERN):
        with contextlib.suppress(ConnectionFailed, OSError), connect(path, 1.0) as run:
            write_frame(run, json.dumps(greeting).encode())
            told = True
    if not told:
        log.offended(Offence(client, kind, one_line(reason)))


def raise_limit_of_descriptors() -> None:
    """Let this process have as many connections open as the system allows it."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def serve_federation(
    home: Path, host: str, port: int, *, insecure: bool, say: Callable[[str], object]
) -> None:
    """Serve until told to stop, and say when clients can join."""
    if insecure:
        say(
            "warning: no TLS: everybody on the network can read along, and another server could pass "
            "for this one"
        )

    def ready(serving: Serving) -> None:
        say(f"clients can join at port {port}; folder {home}")

    start(ServerHome(home), host=host, port=port, insecure=insecure, ready=ready)


def stop_server(home: Path) -> int:
    """Tell the server in a folder to stop; return its process.

    Raises:
        ConnectionFailed: None runs there.
    """
    return end("server", ServerHome(home).lock)


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


def _configure(home: ServerHome, serving: Serving) -> None:
    """Make certificates by which Flower's processes on this machine know each other, and tell them."""
    make_authority(home.flower, [HERE, "localhost"], days=INTERNAL)
    link = {
        "address": address(HERE, serving.flower),
        "root-certificates": str(home.flower.resolve() / CA),
    }
    table = {"superlink": {"default": LINK, LINK: link}}
    write_whole(home.flower / "config.toml", write_toml(table).encode())


def _children(home: ServerHome, serving: Serving) -> list[Child]:
    """Return Flower's server, and what starts a process for each run."""
    logs, flower = home.path / "logs", home.flower.resolve()
    program("flower-superlink")  # or Flower is not installed
    link = [
        *(sys.executable, "-m", "fedloom.deployment.flower_server"),
        *("--ssl-ca-certfile", str(flower / CA)),
        *("--ssl-certfile", str(flower / CERTIFICATE)),
        *("--ssl-keyfile", str(flower / KEY)),
        "--enable-supernode-auth",
        *("--isolation", "process"),
        *("--host", HERE, "--port", str(serving.flower)),
        *("--database", str(home.path.resolve() / DATABASE)),
        "--disable-runtime-dependency-installation",
    ]
    starter = [
        "flower-superexec",
        *("--root-certificates", str(flower / CA)),
        *("--runtime-api-address", address(HERE, serving.flower)),
    ]
    environment = {"FLWR_HOME": str(flower)}
    return [
        Child(link, logs / "superlink.out", environment),
        Child(starter, logs / "serverapp.out", environment),
    ]


class Registry:
    """Tells Flower whom we let in, as often as that changes."""

    def __init__(self, home: ServerHome, log: AuditLog) -> None:
        self.home, self.log = home, log
        self.path = home.path / REGISTERED
        self.nodes = registered(home)
        self._seen: list[Member] | None = None
        self._again, self._noted = 0.0, False

    def follow(self) -> None:
        """Register who was let in and remove who was revoked since the last call.

        Raises:
            FedloomError: The list cannot be read, or Flower not be told; what it was told is kept.
        """
        members = self.home.members().members
        if members == self._seen:
            return
        failed: list[FedloomError] = []
        for number, member in enumerate(members):
            try:
                if member.revoked and member.key in self.nodes:
                    self._remove(number, member)
                elif not member.revoked and member.key not in self.nodes:
                    self._add(number, member)
            except FedloomError as error:  # the others are not to wait for this one
                failed.append(error)
        self._keep(self.nodes)  # a full disk may have kept the last from being written
        if failed:
            raise failed[0]
        self._seen = members

    def keep_following(self) -> None:
        """Follow; what fails is noted in the audit log, once, and tried again after a while."""
        if time.monotonic() < self._again:
            return
        try:
            self.follow()
            self._noted = False
        except Exception as error:  # whatever it is, the runs go on
            self._again = time.monotonic() + RETRY
            if not self._noted:
                with contextlib.suppress(OutputError):  # a full disk may be what failed
                    self.log.record("registry_failed", reason=f"{type(error).__name__}: {error}")
                    self._noted = True

    def _add(self, number: int, member: Member) -> None:
        public = self.home.path / f"client-{number:04d}.pub"
        write_whole(public, f"{member.key}\n".encode(), 0o644)
        words = ("supernode", "register", str(public), LINK, "--name", member.name)
        found = flwr(self.home.flower, *words)
        self._keep({**self.nodes, member.key: str(found["node-id"])})
        self.log.record("allowed", client=number, name=member.name)

    def _remove(self, number: int, member: Member) -> None:
        flwr(self.home.flower, "supernode", "unregister", self.nodes[member.key], LINK)
        self._keep({key: node for key, node in self.nodes.items() if key != member.key})
        self.log.record("revoked", client=number, name=member.name)

    def _keep(self, nodes: dict[str, str]) -> None:
        """Keep what Flower was told: told the same again, it would refuse."""
        self.nodes = nodes
        write_whole(self.path, write_toml(nodes).encode())


class Expiry:
    """Looks now and then whether the certificate is still in force, until the log says that it is not."""

    def __init__(self, home: ServerHome, log: AuditLog, *, insecure: bool) -> None:
        self.home, self.log = home, log
        self._told, self._next = insecure, 0.0

    def look(self) -> None:
        """Look, if the last time is some while ago."""
        if not self._told and time.monotonic() >= self._next:
            self._next = time.monotonic() + CHECK
            self._told = has_expired(self.home, self.log)


def has_expired(home: ServerHome, log: AuditLog) -> bool:
    """Return whether the certificate is in force no longer: clients turn away, and the log says why."""
    try:
        require_current(home.certificate)
    except IdentityError as error:
        log.record("expired", reason=str(error))
        return True
    return False


def require_named(certificate: Path, host: str) -> None:
    """Check that the server's certificate names the host at which its own machine reaches it.

    Raises:
        IdentityError: It does not.
    """
    names: list[str] = []
    with contextlib.suppress(ValueError):  # it names none
        names = [name.lower() for name in hosts_of(certificate.read_text())]
    if host.lower() not in names and f"*.{host.lower().partition('.')[2]}" not in names:
        raise IdentityError(
            f"the certificate {certificate} is for {', '.join(names) or 'no host'} and not for {host}, "
            f"where this server is to be reached; `fedloom certs --host {host}`, and --host for each "
            "other name, makes one that is"
        )
