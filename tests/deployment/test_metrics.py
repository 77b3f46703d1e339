"""Figures for Prometheus, and whether a server is alive and ready."""

import contextlib
import socket
import time
from types import SimpleNamespace

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from fedloom.deployment import health as healths
from fedloom.deployment.counters import Counts
from fedloom.deployment.health import Health
from fedloom.deployment.metrics import MetricsServer, ServerCollector, private_address
from fedloom.deployment.processes import SupervisedProcess, Supervisor, free_port
from fedloom.errors import ConnectionFailed, SettingsError
from fedloom.security.certificates import make_authority

STATUS = {
    "server": {"since": 1_000.0, "connections": {"clients": 3, "unproven": 2}},
    "members": [
        {"name": "north", "state": "allowed", "connected": True, "since": 7.0, "offences": None},
        {"name": "south", "state": "allowed", "connected": False, "since": 9.5,
         "offences": {"kinds": {"forged": 2}}},
        {"name": 'a "b" {c}', "state": "revoked", "connected": False, "since": 0.0, "offences": None},
    ],
    "runs": [
        {"name": "x", "state": "playing", "rounds": 9, "round": 3, "attendance": [
            {"name": "north", "reason": ""}, {"name": "south", "reason": "its disk is full"}],
         "left_out": [{"name": "south", "reason": "its disk is full"}, {"name": "north", "reason": "late"}]},
        {"name": "y", "state": "waiting", "rounds": None, "round": None, "attendance": [],
         "left_out": []},
    ],
}  # fmt: skip


class Site:
    """A server's parts that are looked after."""

    def __init__(self, folder):
        make_authority(folder, ["localhost"], days=90)
        running = SimpleNamespace(poll=lambda: None)
        self.child = SupervisedProcess(["flower-superlink"], folder / "superlink.out", {}, running)
        self.nodes, self.members = SimpleNamespace(problem=""), SimpleNamespace(fault="")
        gateway = SimpleNamespace(members=self.members)
        self.health = Health(
            folder, folder / "server.pem", Supervisor([self.child]), self.nodes, gateway
        )
        self.counts = Counts()
        self.port = free_port()
        collector = ServerCollector(lambda: STATUS, self.counts, self.health)
        self.server = MetricsServer(f"127.0.0.1:{self.port}", collector, self.health)

    def get(self, path):
        return httpx.get(f"http://127.0.0.1:{self.port}{path}", timeout=5)

    def figures(self):
        found = text_string_to_metric_families(self.get("/metrics").text)
        return {
            (sample.name, *sorted(sample.labels.values())): sample.value
            for family in found
            for sample in family.samples
        }


@pytest.fixture
def site(tmp_path):
    own = Site(tmp_path)
    with contextlib.closing(own.server):
        yield own


def test_figures_are_those_of_status_and_of_what_was_counted(site):
    for name, label, amount in (
        ("connections", "stream", 1), ("connections", "stream", 1), ("connections", "fleet", 1),
        ("refusals", "identity", 1), ("runs", "finished", 1), ("received", "stream", 1000),
        ("sent", "calls", 7), ("rounds", "", 1), ("rounds", "", 1), ("round_seconds", "", 1.5),
        ("round_seconds", "", 2.5),
    ):  # fmt: skip
        site.counts.add(name, label, amount)
    found = site.figures()
    expected = {
        ("fedloom_start_time_seconds",): 1_000,
        ("fedloom_ready",): 1,
        ("fedloom_members", "allowed"): 2,
        ("fedloom_members", "revoked"): 1,
        ("fedloom_members", "withdrawn"): 0,
        ("fedloom_member_connected", "north"): 1,
        ("fedloom_member_connected", "south"): 0,
        ("fedloom_member_since_seconds", "south"): 9.5,
        ("fedloom_open_connections", "clients"): 3,
        ("fedloom_open_connections", "unproven"): 2,
        ("fedloom_connections_total", "stream"): 2,
        ("fedloom_connections_total", "fleet"): 1,
        ("fedloom_refusals_total", "identity"): 1,
        ("fedloom_runs_total", "finished"): 1,
        ("fedloom_bytes_total", "received", "stream"): 1000,
        ("fedloom_bytes_total", "calls", "sent"): 7,
        ("fedloom_round_seconds_count",): 2,
        ("fedloom_round_seconds_sum",): 4,
        ("fedloom_queued_runs", "playing"): 1,
        ("fedloom_queued_runs", "waiting"): 1,
        ("fedloom_queued_runs", "starting"): 0,
        ("fedloom_run_round", "x"): 3,
        ("fedloom_run_rounds", "x"): 9,
        ("fedloom_run_missing", "its disk is full", "south", "x"): 1,
        ("fedloom_run_missing", "late", "north", "x"): 1,
        ("fedloom_offences_total", "forged", "south"): 2,
    }
    assert {key: found.get(key) for key in expected} == expected
    assert sum("fedloom_run_missing" in key for key in found) == 2
    assert found["fedloom_certificate_expiry_seconds",] == pytest.approx(
        time.time() + 90 * 86_400, abs=7200
    )


def test_a_server_is_alive_as_long_as_its_loop_goes_round(site, monkeypatch):
    assert (site.get("/healthz").status_code, site.get("/healthz").text) == (200, "ok\n")
    real = time.monotonic
    monkeypatch.setattr(healths.time, "monotonic", lambda: real() + healths.STUCK + 1)
    assert site.get("/healthz").status_code == 503
    site.health.turn()
    assert site.get("/healthz").status_code == 200


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (lambda site: setattr(site.child.process, "poll", lambda: 1), "flower-superlink does not run"),
        (lambda site: setattr(site.nodes, "problem", "no answer"), "does not know the allowed members: no answer"),
        (lambda site: setattr(site.members, "fault", "line 3"), "when it could last be read: line 3"),
        (lambda site: (site.health.folder / "server.pem").unlink(), "server.pem"),
    ],
)  # fmt: skip
def test_a_server_that_cannot_do_its_work_is_not_ready_and_says_why(site, fault, said):
    assert (site.get("/readyz").status_code, site.get("/readyz").text) == (200, "ok\n")
    fault(site)
    answer = site.get("/readyz")
    assert answer.status_code == 503 and said in answer.text
    assert site.figures()["fedloom_ready",] == 0
    assert site.get("/healthz").status_code == 200


def test_what_will_keep_it_from_its_work_is_said_before(site, monkeypatch):
    assert site.health.warnings() == []
    site.health.expires = time.time() + 3 * 86_400 + 60
    monkeypatch.setattr(healths.shutil, "disk_usage", lambda folder: SimpleNamespace(free=5 << 20))
    certificate, disk = site.health.warnings()
    assert "expires in 3 days: `fedloom certs`" in certificate and "has 5 MB left" in disk
    assert site.get("/readyz").status_code == 200


def test_nothing_else_is_answered_and_nobody_holds_it_up(site):
    assert site.get("/members.toml").status_code == 404
    assert httpx.post(f"http://127.0.0.1:{site.port}/metrics", timeout=5).status_code == 501
    with contextlib.ExitStack() as idle:
        for _ in range(20):
            idle.enter_context(socket.create_connection(("127.0.0.1", site.port)))
        assert site.get("/healthz").status_code == 200


@pytest.mark.parametrize(
    "where", ["127.0.0.1", "localhost", "[::1]:9000", "10.3.4.5:80", "[fd00::1]"]
)
def test_a_private_address_may_be_listened_at(where):
    assert private_address(where)[1] in (80, 9000, 9464)


@pytest.mark.parametrize(
    "where", ["0.0.0.0:9464", "[::]:1", "8.8.8.8:9464", "fed.example.org", "x:y"]
)
def test_figures_are_not_given_to_other_networks(where):
    with pytest.raises(SettingsError):
        private_address(where)


def test_a_port_that_is_taken_is_said(site):
    with pytest.raises(ConnectionFailed, match=r"cannot listen at 127.0.0.1:\d+: Address already"):
        MetricsServer(
            f"127.0.0.1:{site.port}", ServerCollector(dict, Counts(), site.health), site.health
        )
