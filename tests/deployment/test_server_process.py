"""What the server looks after beside its processes: its certificate, and what clients get wrong at the gateway."""

import contextlib
import json
import time

import pytest

from fedloom.deployment import server
from fedloom.deployment.folders import ServerFolder
from fedloom.engines.flower.streams import Streams
from fedloom.errors import IdentityError
from fedloom.security.audit_log import AuditLog
from fedloom.security.certificates import make_authority


@pytest.fixture
def home(tmp_path):
    home = ServerFolder(tmp_path / "server")
    home.path.mkdir()
    return home


@pytest.mark.parametrize(("insecure", "looks"), [(False, 2), (True, 0)])
def test_the_certificate_is_looked_at_once_a_minute(home, monkeypatch, insecure, looks):
    now, found = [100.0], []
    monkeypatch.setattr(server.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(server, "has_expired", lambda home, log: found.append(1) or len(found) == 2)
    expiry = server.Expiry(home, AuditLog(home.path / "audit.jsonl"), insecure=insecure)
    for _ in range(1000):  # 200 seconds; the second look finds it expired, which is said once
        expiry.look()
        now[0] += 0.2
    assert len(found) == looks


@pytest.mark.parametrize("host", ["10.0.0.5", "fed.example.org"])
def test_a_host_that_the_certificate_does_not_name_is_said_first(home, host):
    make_authority(home.path, ["localhost", "*.example.com"])
    with pytest.raises(IdentityError, match=rf"is for localhost.* `fedloom certs --host {host}`"):
        server.start(home, host=host)
    assert not home.flower.exists()
    server.require_named(home.certificate, "fed.example.com")


def test_a_certificate_without_its_key_ends_the_start_for_good(home):
    make_authority(home.path, ["localhost"])
    home.key.unlink()
    with pytest.raises(IdentityError, match=r"server.key: .*; `fedloom certs` makes one"):
        server.start(home)


def test_without_tls_it_is_said_what_is_lost(home, monkeypatch):
    said = []
    monkeypatch.setattr(server, "start", lambda *args, **options: None)
    server.serve_federation(home.path, "0.0.0.0", 1, insecure=True, metrics=None, say=said.append)
    (warning,) = said
    assert "no TLS" in warning and "another server" in warning and "take part" not in warning


def test_what_a_client_gets_wrong_at_the_gateway_counts_in_the_run_under_way_or_in_the_log(home):
    log = server.ViolationLog(home.path / "offences.jsonl")
    for _ in range(150):
        server.report_violation(home, log, 3, "forbidden", "a path")
    told = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert len(told) == 100 and told[0]["client"] == 3 and told[0]["kind"] == "forbidden"
    found = []
    with contextlib.closing(Streams(home.streams / ("a" * 32))) as run:
        run.report = lambda *words: found.append(words)
        server.report_violation(home, log, 3, "oversized", "a body")
        end = time.monotonic() + 10
        while not found and time.monotonic() < end:
            time.sleep(0.01)
    assert found == [(3, "oversized", "a body")]
    assert len(log.path.read_text().splitlines()) == 100
