"""The server of a federation: the gateway, Flower's server behind it, and their supervision."""

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
from typing import Any

from fedloom.deployment.administration import SOCKET, ControlSocket
from fedloom.deployment.flower_control import FlowerControl
from fedloom.deployment.flower_fleet import Upstream
from fedloom.deployment.flower_nodes import FlowerNodes
from fedloom.deployment.folders import ServerFolder, ServerStatus
from fedloom.deployment.gateway import Gateway, GatewaySettings
from fedloom.deployment.gateway_client import PORT
from fedloom.deployment.health import Health
from fedloom.deployment.metrics import MetricsServer, ServerCollector, private_address
from fedloom.deployment.network_exposure import require_unexposed
from fedloom.deployment.processes import (
    SupervisedProcess,
    Supervisor,
    address,
    end,
    free_port,
    only,
    program,
    reachable,
    require_free,
    wait_until_open,
)
from fedloom.deployment.proxy import bypass_for_loopback
from fedloom.deployment.run_queue import RunQueue
from fedloom.deployment.run_requests import Asked
from fedloom.deployment.status import server_status
from fedloom.deployment.violations import FILE as VIOLATIONS
from fedloom.deployment.violations import ViolationLog
from fedloom.errors import ConnectionFailed, IdentityError, SettingsError, ViolationKind
from fedloom.federation.violations import Violation, one_line
from fedloom.security.audit_log import FILE, AuditLog, Limited, no_op_recorder
from fedloom.security.certificates import (
    CA,
    CERTIFICATE,
    KEY,
    hosts_of,
    make_authority,
    require_current,
)
from fedloom.security.client_registry import FILE as MEMBERS
from fedloom.security.client_registry import stamp_of
from fedloom.security.keys import read_key
from fedloom.settings.schema import parse
from fedloom.storage.files import make_private
from fedloom.wire.framing import connect, write_frame

RUN_PATTERN = "[0-9a-f]" * 32
"""File names of the sockets of runs."""

HERE = "127.0.0.1"
"""Where Flower's server listens: on this machine alone."""

INTERNAL = 3650
"""Validity in days of the certificates between Flower's processes on this machine; the server's is
renewed at each start."""

TURN = 5e-4
"""Interval in seconds after which a thread yields to a waiting one: members' data is passed on while
handshakes of other peers are processed, and would wait ten times as long by default."""

CHECK = 60.0
"""Seconds between checks of the certificate's expiry."""


def start(
    server_folder: ServerFolder,
    *,
    host: str = "0.0.0.0",
    port: int = PORT,
    insecure: bool = False,
    metrics: str | None = None,
    ready: Callable[[ServerStatus], None] = lambda serving: None,
) -> None:
    """Serve until stopped (SIGTERM or SIGINT).

    Args:
        server_folder: The server's folder.
        host: Address to listen at.
        port: Of the gateway.
        insecure: Whether to serve without TLS: traffic can then be read, and clients cannot verify the
            server; clients must still prove their keys.
        metrics: HOST:PORT, at a private address, of figures for Prometheus and of whether it is alive
            and ready; ``None`` for none.
        ready: Called once clients can join.

    Raises:
        IdentityError: A certificate or its key is missing or may not be read; the certificate has
            expired, or does not name the host.
        ConnectionFailed: A server runs in the folder, a port is taken, or Flower does not start.
    """
    if metrics is not None:
        require_free(*private_address(metrics))
    if not insecure:
        require_current(server_folder.certificate)
        require_current(server_folder.authority)
        read_key(server_folder.key, "fedloom certs")
        require_named(server_folder.certificate, reachable(host))
    serving = ServerStatus(
        host=host,
        port=port,
        flower=free_port(),
        insecure=insecure,
        pid=os.getpid(),
        since=time.time(),
        metrics=metrics,
    )
    with only("server", server_folder.lock):
        _serve(server_folder, serving, ready)


def _serve(
    server_folder: ServerFolder, serving: ServerStatus, ready: Callable[[ServerStatus], None]
) -> None:
    """Serve as the only server of a folder."""
    settings = GatewaySettings.read(server_folder.settings)
    supervisor = Supervisor(_flower_processes(server_folder, serving))
    supervisor.end_orphans()
    require_free(serving.host, serving.port)
    bypass_for_loopback()  # Flower's own clients heed HTTPS_PROXY
    opened = _made_private(server_folder)
    make_authority(server_folder.flower, [HERE, "localhost"], days=INTERNAL)
    log = AuditLog(server_folder.path / FILE)
    stopping = _signals_to_stop()
    raise_limit_of_descriptors()
    sys.setswitchinterval(TURN)
    authority = server_folder.flower / CA
    with contextlib.ExitStack() as closing:
        control = closing.enter_context(
            FlowerControl(address(HERE, serving.flower), authority.read_bytes())
        )
        nodes = FlowerNodes(control, server_folder.members, server_folder.nodes, log.record)
        gateway = _gateway(server_folder, serving, settings, nodes, log)
        closing.callback(log.record, "stopped")
        closing.callback(server_folder.started.unlink, missing_ok=True)
        closing.callback(supervisor.stop)
        closing.callback(gateway.stop)
        begin_anew(server_folder)
        _start_flower(supervisor.processes[0], serving)
        gateway.note = Limited(log.record)
        queue = RunQueue(server_folder, control, log.record, gateway.counts)
        closing.callback(queue.close)
        certificate = None if serving.insecure else server_folder.certificate
        health = Health(server_folder.path, certificate, supervisor, nodes, gateway)
        serving.write(server_folder.started)
        log.record("started", port=serving.port, tls=not serving.insecure)
        for folder in opened:
            log.record("made_private", folder=folder.name)
        expiry = Expiry(server_folder, log, insecure=serving.insecure)
        nodes.follow()
        status = partial(server_status, server_folder, serving, gateway, queue, health)
        closing.callback(_commands(server_folder, status, queue).close)
        if serving.metrics is not None:
            collector = ServerCollector(status, gateway.counts, health)
            closing.callback(MetricsServer(serving.metrics, collector, health).close)
        ready(serving)
        while not stopping:
            for supervised in supervisor.processes:
                if supervised.keep_alive():
                    log.record("restarted", process=supervised.name)
                    nodes.doubt()
            nodes.keep_following()
            queue.advance()
            gateway.follow()
            expiry.look()
            health.turn()
            time.sleep(0.2)


def _made_private(server_folder: ServerFolder) -> list[Path]:
    """Have new files belong to this user alone; return the folders that others could read before."""
    os.umask(0o077)
    folders = (
        server_folder.path,
        server_folder.flower,
        server_folder.streams,
        server_folder.requests,
        server_folder.path / "logs",
    )
    return [folder for folder in folders if make_private(folder)]


def _signals_to_stop() -> list[int]:
    """Return the list to which each SIGTERM and SIGINT is added once it comes."""
    stopping: list[int] = []
    for kind in (signal.SIGTERM, signal.SIGINT):
        signal.signal(kind, lambda number, frame: stopping.append(number))
    return stopping


def _gateway(
    server_folder: ServerFolder,
    serving: ServerStatus,
    settings: GatewaySettings,
    nodes: FlowerNodes,
    log: AuditLog,
) -> Gateway:
    """Return the gateway, listening; unauthenticated requests are not recorded yet."""
    context = ssl.create_default_context(cafile=str(server_folder.flower / CA))
    gateway = Gateway(
        server_folder.members,
        log.record,
        server_folder.streams,
        Upstream(HERE, serving.flower, context, server_folder.database, settings.flower_bytes),
        settings,
        partial(report_violation, server_folder, ViolationLog(server_folder.path / VIOLATIONS)),
        lambda: stamp_of(server_folder.path / MEMBERS),
        nodes.of,
    )
    gateway.note = Limited(no_op_recorder)  # the next of them come from this process
    tls = None if serving.insecure else (server_folder.certificate, server_folder.key)
    gateway.listen(serving.host, serving.port, tls)
    return gateway


def _start_flower(link: SupervisedProcess, serving: ServerStatus) -> None:
    """Start Flower's server, and check that it can be reached from this machine alone.

    Raises:
        ConnectionFailed: It does not start, or other machines can reach it.
    """
    link.keep_alive()
    wait_until_open(HERE, serving.flower, link)
    host, tls = reachable(serving.host), not serving.insecure
    require_unexposed(host, serving.port, tls=tls, private=serving.flower)


def _commands(
    server_folder: ServerFolder, status: Callable[[], dict[str, Any]], queue: RunQueue
) -> ControlSocket:
    """Answer the commands of the server's user."""

    def submit(asked: dict[str, Any]) -> dict[str, Any]:
        settings, problems = parse(Asked, asked, "request")
        if settings is None:
            raise SettingsError(problems, "the command")
        before = queue.listed()
        return {**queue.submit(settings).shown(), "before": before}

    return ControlSocket(
        server_folder.path / SOCKET,
        {
            "status": lambda asked: status(),
            "submit": submit,
            "runs": lambda asked: queue.listed(),
            "stop": lambda asked: queue.stop(asked.get("run")),
        },
    )


def begin_anew(server_folder: ServerFolder) -> None:
    """Delete files that Flower and runs of an earlier server have left; none is needed again.

    The registry is a separate file, and an interrupted run is resumed from its run folder.
    """
    for name in ("", "-wal", "-shm", "-journal"):
        server_folder.database.with_name(server_folder.database.name + name).unlink(missing_ok=True)
    for stale in server_folder.streams.iterdir():
        stale.unlink(missing_ok=True)


def report_violation(
    server_folder: ServerFolder, log: ViolationLog, client: int, kind: ViolationKind, reason: str
) -> None:
    """Count a violation at the gateway: in the current run, or otherwise only in the log."""
    passed_on, report = False, {"client": client, "offence": kind, "reason": one_line(reason)}
    for path in server_folder.streams.glob(RUN_PATTERN):
        with contextlib.suppress(ConnectionFailed, OSError), connect(path, 1.0) as run:
            write_frame(run, json.dumps(report).encode())
            passed_on = True
    if not passed_on:
        log.record(Violation(client, kind, one_line(reason)))


def raise_limit_of_descriptors() -> None:
    """Raise the limit of open connections of this process to the system's maximum."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def serve_federation(
    server_folder: Path,
    host: str,
    port: int,
    *,
    insecure: bool,
    metrics: str | None,
    say: Callable[[str], object],
) -> None:
    """Serve until stopped, and print when clients can join."""
    if insecure:
        say(
            "warning: no TLS: everybody on the network can read the traffic, and another server could "
            "pass "
            "for this one"
        )

    def ready(serving: ServerStatus) -> None:
        say(f"clients can join at port {port}; folder {server_folder}")

    own = ServerFolder(server_folder)
    start(own, host=host, port=port, insecure=insecure, metrics=metrics, ready=ready)


def stop_server(server_folder: Path) -> int:
    """Stop the server of a folder; return its process id.

    Raises:
        ConnectionFailed: None runs there.
    """
    return end("server", ServerFolder(server_folder).lock)


def _flower_processes(
    server_folder: ServerFolder, serving: ServerStatus
) -> list[SupervisedProcess]:
    """Return Flower's server, and what starts a process for each run."""
    logs, flower = server_folder.path / "logs", server_folder.flower.resolve()
    program("flower-superlink")  # otherwise Flower is not installed
    link = [
        *(sys.executable, "-m", "fedloom.deployment.flower_server"),
        *("--ssl-ca-certfile", str(flower / CA)),
        *("--ssl-certfile", str(flower / CERTIFICATE)),
        *("--ssl-keyfile", str(flower / KEY)),
        "--enable-supernode-auth",
        *("--isolation", "process"),
        *("--host", HERE, "--port", str(serving.flower)),
        *("--database", str(server_folder.database.resolve())),
        "--disable-runtime-dependency-installation",
    ]
    starter = [
        *(sys.executable, "-m", "fedloom.deployment.flower_starter"),
        *("--root-certificates", str(flower / CA)),
        *("--runtime-api-address", address(HERE, serving.flower)),
    ]
    environment = {"FLWR_HOME": str(flower)}
    return [
        SupervisedProcess(link, logs / "superlink.out", environment),
        SupervisedProcess(starter, logs / "serverapp.out", environment),
    ]


class Expiry:
    """Checks periodically whether the certificate is valid, until the log records that it is not."""

    def __init__(self, server_folder: ServerFolder, log: AuditLog, *, insecure: bool) -> None:
        self.server_folder, self.log = server_folder, log
        self._warned, self._next = insecure, 0.0

    def look(self) -> None:
        """Check, if the last check was some time ago."""
        if not self._warned and time.monotonic() >= self._next:
            self._next = time.monotonic() + CHECK
            self._warned = has_expired(self.server_folder, self.log)


def has_expired(server_folder: ServerFolder, log: AuditLog) -> bool:
    """Return whether the certificate has expired, and record it: clients refuse the connection."""
    try:
        require_current(server_folder.certificate)
    except IdentityError as error:
        log.record("expired", reason=str(error))
        return True
    return False


def require_named(certificate: Path, host: str) -> None:
    """Check that the server's certificate names the host under which this machine reaches it.

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
