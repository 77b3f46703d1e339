"""Metrics of a server for Prometheus, and its liveness and readiness, over HTTP at a private address.

They are collected when they are asked for, from what ``fedloom status`` shows and from counts since the
server's start.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import ipaddress
import socket
import threading
from collections.abc import Callable, Iterable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, get_args

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, SummaryMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from fedloom.deployment.counters import Count, Counts
from fedloom.deployment.gateway_client import split_address
from fedloom.deployment.health import Health
from fedloom.deployment.processes import address, require_free
from fedloom.errors import SettingsError
from fedloom.security.client_registry import State
from fedloom.wire.envelope import PROTOCOL

TIMEOUT = 10.0
"""Seconds in which a question must have come whole."""

PORT = 9464
"""Where Prometheus finds exporters that choose none (of OpenTelemetry)."""


class ServerCollector(Collector):
    """Collects the figures of a server."""

    def __init__(
        self, status: Callable[[], Mapping[str, Any]], counts: Counts, health: Health
    ) -> None:
        """Collect from these.

        Args:
            status: Returns what ``fedloom status --json`` shows.
            counts: What the server has counted.
            health: Whether it does its work.
        """
        self.status, self.counts, self.health = status, counts, health

    def collect(self) -> Iterable[Metric]:
        """Return all figures."""
        status = self.status()
        members, server = status["members"], status["server"]
        build = GaugeMetricFamily(
            "fedloom_build_info", "1, with release and protocol.", labels=["version", "protocol"]
        )
        build.add_metric([importlib.metadata.version("fedloom"), str(PROTOCOL)], 1)
        yield build
        yield GaugeMetricFamily(
            "fedloom_start_time_seconds", "Start of the server.", server["since"]
        )
        yield GaugeMetricFamily(
            "fedloom_ready", "Whether clients can take part and runs can start.",
            not self.health.problems(),
        )  # fmt: skip
        if self.health.expires is not None:
            yield GaugeMetricFamily(
                "fedloom_certificate_expiry_seconds", "When the certificate expires.",
                self.health.expires,
            )  # fmt: skip
        counted = GaugeMetricFamily("fedloom_members", "Members by state.", labels=["state"])
        for state in get_args(State):
            counted.add_metric([state], sum(own["state"] == state for own in members))
        yield counted
        connected = GaugeMetricFamily(
            "fedloom_member_connected", "Whether an allowed member is connected.", labels=["member"]
        )
        since = GaugeMetricFamily(
            "fedloom_member_since_seconds", "When that began.", labels=["member"]
        )
        for own in members:
            if own["state"] == "allowed":
                connected.add_metric([own["name"]], own["connected"])
                since.add_metric([own["name"]], own["since"])
        yield from (connected, since)
        yield self._open(server["connections"])
        yield from self._totals()
        yield from _runs(status["runs"])
        yield _violations(members)

    @staticmethod
    def _open(connections: Mapping[str, int]) -> Metric:
        found = GaugeMetricFamily(
            "fedloom_open_connections", "Connections that are open.", labels=["of"]
        )
        for of, count in connections.items():
            found.add_metric([of], count)
        return found

    def _totals(self) -> Iterable[Metric]:
        connections = CounterMetricFamily(
            "fedloom_connections", "Connections of admitted clients.", labels=["purpose"]
        )
        refusals = CounterMetricFamily(
            "fedloom_refusals", "Refused connections.", labels=["reason"]
        )
        ended = CounterMetricFamily("fedloom_runs", "Runs that ended.", labels=["outcome"])
        counted: Mapping[Count, CounterMetricFamily] = {
            "connections": connections, "refusals": refusals, "runs": ended,
        }  # fmt: skip
        for name, family in counted.items():
            for label, count in self.counts.of(name).items():
                family.add_metric([label], count)
            yield family
        traffic = CounterMetricFamily(
            "fedloom_bytes", "Bytes from and to clients, of TLS's content.",
            labels=["direction", "over"],
        )  # fmt: skip
        directions: tuple[Count, ...] = ("received", "sent")
        for direction in directions:
            for over, count in self.counts.of(direction).items():
                traffic.add_metric([direction, over], count)
        yield traffic
        rounds, seconds = self.counts.of("rounds"), self.counts.of("round_seconds")
        yield SummaryMetricFamily(
            "fedloom_round_seconds", "Finished rounds, and their seconds.",
            int(sum(rounds.values())), sum(seconds.values()),
        )  # fmt: skip


def _runs(runs: Iterable[Mapping[str, Any]]) -> Iterable[Metric]:
    waiting = GaugeMetricFamily("fedloom_queued_runs", "Runs by state.", labels=["state"])
    listed = list(runs)
    for state in ("waiting", "starting", "playing"):
        waiting.add_metric([state], sum(run["state"] == state for run in listed))
    done = GaugeMetricFamily("fedloom_run_round", "The last finished round.", labels=["run"])
    planned = GaugeMetricFamily("fedloom_run_rounds", "Rounds in all.", labels=["run"])
    missing = GaugeMetricFamily(
        "fedloom_run_missing", "1 for each member that a run misses or has left out of its last round.",
        labels=["run", "member", "reason"],
    )  # fmt: skip
    for run in listed:
        if run["rounds"] is not None:
            done.add_metric([run["name"]], run["round"] or 0)
            planned.add_metric([run["name"]], run["rounds"])
        away = [(own["name"], own["reason"]) for own in (*run["attendance"], *run["left_out"])]
        for name, reason in dict.fromkeys(away):
            if reason:
                missing.add_metric([run["name"], name, reason], 1)
    return waiting, done, planned, missing


def _violations(members: Iterable[Mapping[str, Any]]) -> Metric:
    found = CounterMetricFamily(
        "fedloom_offences", "What members got wrong, by kind.", labels=["member", "kind"]
    )
    for own in members:
        for kind, count in ((own["offences"] or {}).get("kinds") or {}).items():
            found.add_metric([own["name"], kind], count)
    return found


class MetricsServer:
    """Answers ``/metrics``, ``/healthz`` and ``/readyz``, and nothing else."""

    def __init__(self, where: str, collector: Collector, health: Health) -> None:
        """Answer at HOST:PORT until :meth:`close`.

        Raises:
            SettingsError: The address is not a private one.
            ConnectionFailed: The port is taken.
        """
        host, port = private_address(where)
        require_free(host, port)
        registry = CollectorRegistry(auto_describe=False)
        registry.register(collector)

        class Handler(BaseHTTPRequestHandler):
            timeout = TIMEOUT

            def do_GET(self) -> None:
                status, kind, body = answer(self.path, registry, health)
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *arguments: object) -> None:
                """Log nothing: requests come every few seconds."""

            def handle(self) -> None:
                with contextlib.suppress(OSError):  # who asked has gone
                    super().handle()

        class Server(ThreadingHTTPServer):
            address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
            daemon_threads = True

        self._server = Server((host, port), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.2,), daemon=True).start()

    def close(self) -> None:
        """Stop answering."""
        self._server.shutdown()
        self._server.server_close()


def answer(path: str, registry: CollectorRegistry, health: Health) -> tuple[int, str, bytes]:
    """Return status, type and body of the response to a question."""
    text = "text/plain; charset=utf-8"
    match path.partition("?")[0]:
        case "/metrics":
            return 200, CONTENT_TYPE_LATEST, generate_latest(registry)
        case "/healthz":
            alive = health.is_alive()
            return (200, text, b"ok\n") if alive else (503, text, b"the server is stuck\n")
        case "/readyz":
            problems = health.problems()
            body = "".join(f"{problem}\n" for problem in problems) or "ok\n"
            return 503 if problems else 200, text, body.encode()
    return 404, text, b"there are /metrics, /healthz and /readyz\n"


def private_address(where: str) -> tuple[str, int]:
    """Return host and port of an address that other networks do not reach.

    Raises:
        SettingsError: It is another one: the metrics name members, and there is no authentication.
    """
    host, port = split_address(where, PORT)
    with contextlib.suppress(ValueError):
        own = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
        if own.is_private and not own.is_unspecified:
            return str(own), port
    raise SettingsError(
        [
            f"--metrics {where}: figures name members, without authentication, so they are "
            f"given at a private address alone, such as {address('127.0.0.1', PORT)}"
        ],
        "the command",
    )
