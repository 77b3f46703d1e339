"""Flower is told of who is let in, and of who is no longer, whenever that happens."""

import contextlib
import json
import time

import pytest

from fedloom.audit import AuditLog, events
from fedloom.deployment import server
from fedloom.deployment.homes import ServerHome
from fedloom.engines.streams import Streams
from fedloom.errors import FedloomError, IdentityError, OutputError
from fedloom.identity import make_authority, make_key


@pytest.fixture
def home(tmp_path):
    home = ServerHome(tmp_path / "server")
    home.path.mkdir()
    for name in ("north", "south"):
        make_key(tmp_path / f"{name}.key")
        home.members().allow(name, (tmp_path / f"{name}.pub").read_text())
    return home


def made(home):
    return server.Registry(home, AuditLog(home.path / "audit.jsonl"))


@pytest.fixture
def told(monkeypatch, home):
    """What Flower is told, what happens meanwhile, and which last words it does not take."""
    calls, meanwhile, failing = [], [], []

    def flwr(folder, *words):
        if failing and words[-1] in failing:
            raise FedloomError("flwr supernode failed: it is being restarted")
        calls.append(words[1])
        if meanwhile:
            meanwhile.pop()()
        return {"node-id": len(calls)}

    monkeypatch.setattr(server, "flwr", flwr)
    return calls, meanwhile, failing


def test_it_follows_the_file_and_says_so(home, told):
    calls = told[0]
    registry = made(home)
    registry.follow()
    registry.follow()
    assert calls == ["register", "register"]
    home.members().revoke("south")
    registry.follow()
    assert calls[2:] == ["unregister"] and len(server.registered(home)) == 1
    made(home).follow()
    assert len(calls) == 3
    noted = [(e["event"], e["name"]) for e in events(home.path, "allowed", "revoked")]
    assert noted == [("allowed", "north"), ("allowed", "south"), ("revoked", "south")]


def test_who_is_revoked_while_flower_is_told_of_others_does_not_stay(home, told):
    calls, meanwhile, _ = told
    registry = made(home)
    meanwhile.append(lambda: home.members().revoke("north"))
    registry.follow()
    registry.follow()
    assert calls == ["register", "register", "unregister"]


def test_what_flower_was_told_is_kept_when_the_next_fails(home, told):
    """Told of a key again, Flower refuses it, and every later start would fail."""
    calls, _, failing = told
    failing.append("south")
    with pytest.raises(FedloomError, match="being restarted"):
        made(home).follow()
    assert len(server.registered(home)) == 1
    failing.clear()
    made(home).follow()
    assert calls == ["register", "register"] and len(server.registered(home)) == 2


def test_what_could_not_be_kept_is_kept_later(home, told, monkeypatch):
    write, full = server.write_whole, [True]

    def write_whole(path, *rest):
        if path.name == server.REGISTERED and full:
            raise OutputError("No space left on device")
        write(path, *rest)

    monkeypatch.setattr(server, "write_whole", write_whole)
    home.members().revoke("south")
    registry = made(home)
    with pytest.raises(OutputError):
        registry.follow()
    full.clear()
    registry.follow()
    assert told[0] == ["register"] and len(server.registered(home)) == 1


def test_who_could_not_be_removed_is_removed_later(home, told):
    calls, _, failing = told
    registry = made(home)
    registry.follow()
    home.members().revoke("south")
    failing.append(server.LINK)
    with pytest.raises(FedloomError):
        registry.follow()
    failing.clear()
    registry.follow()
    assert calls == ["register", "register", "unregister"] and len(server.registered(home)) == 1


def test_a_failure_is_noted_once_and_does_not_end_the_server(home, told, monkeypatch):
    calls, _, failing = told
    monkeypatch.setattr(server, "RETRY", 0.0)
    registry = made(home)
    failing.append("south")
    for _ in range(3):
        registry.keep_following()
    failing.clear()
    registry.keep_following()
    assert calls == ["register", "register"]
    clients = home.path / "clients.toml"
    content = clients.read_text()
    for wrong in (content + "[[client]\n", content + '[[client]]\nnam = "x"\n', "client = 5\n"):
        clients.write_text(wrong)
        registry.keep_following()
    clients.write_text(content)
    registry.keep_following()
    first, second = (event["reason"] for event in events(home.path, "registry_failed"))
    assert "being restarted" in first and "not TOML" in second


def test_what_failed_is_not_tried_again_at_once(home, told, monkeypatch):
    calls, _, failing = told
    now = [100.0]
    monkeypatch.setattr(server.time, "monotonic", lambda: now[0])
    registry = made(home)
    failing.append("north")
    registry.keep_following()
    failing.clear()
    registry.keep_following()
    assert calls == ["register"]  # the other one, who did not wait
    now[0] += server.RETRY
    registry.keep_following()
    assert calls == ["register", "register"]


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


def test_without_tls_it_is_said_what_is_lost(home, monkeypatch):
    said = []
    monkeypatch.setattr(server, "start", lambda *args, **options: None)
    server.serve_federation(home.path, "0.0.0.0", 1, insecure=True, say=said.append)
    (warning,) = said
    assert "no TLS" in warning and "another server" in warning and "take part" not in warning


def test_what_a_client_gets_wrong_at_the_gateway_counts_in_the_run_under_way_or_in_the_log(home):
    log = server.OffenceLog(home.path / "offences.jsonl")
    for _ in range(150):
        server.report_offence(home, log, 3, "forbidden", "a path")
    told = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert len(told) == 100 and told[0]["client"] == 3 and told[0]["kind"] == "forbidden"
    found = []
    with contextlib.closing(Streams(home.streams / ("a" * 32))) as run:
        run.report = lambda *words: found.append(words)
        server.report_offence(home, log, 3, "oversized", "a body")
        end = time.monotonic() + 10
        while not found and time.monotonic() < end:
            time.sleep(0.01)
    assert found == [(3, "oversized", "a body")]
    assert len(log.path.read_text().splitlines()) == 100
