"""Flower is told of who is let in, and of who is no longer, whenever that happens."""

import pytest

from fedloom.audit import AuditLog, events
from fedloom.deployment import server
from fedloom.deployment.homes import ServerHome
from fedloom.identity import make_key


@pytest.fixture
def home(tmp_path):
    home = ServerHome(tmp_path / "server")
    home.path.mkdir()
    for name in ("north", "south"):
        make_key(tmp_path / f"{name}.key")
        home.members().allow(name, (tmp_path / f"{name}.pub").read_text())
    return home


@pytest.fixture
def told(monkeypatch, home):
    """What Flower is told, and what happens meanwhile."""
    calls, meanwhile = [], []

    def flwr(folder, *words):
        calls.append(words[1])
        if meanwhile:
            meanwhile.pop()()
        return {"node-id": len(calls)}

    monkeypatch.setattr(server, "flwr", flwr)
    return calls, meanwhile


def test_it_follows_the_file_and_says_so(home, told):
    calls, _ = told
    registry = server.Registry(home, AuditLog(home.path / "audit.jsonl"), insecure=False)
    registry.follow()
    registry.follow()
    assert calls == ["register", "register"]
    home.members().revoke("south")
    registry.follow()
    assert calls[2:] == ["unregister"] and len(server.registered(home)) == 1
    again = server.Registry(home, AuditLog(home.path / "audit.jsonl"), insecure=False)
    again.follow()
    assert len(calls) == 3
    noted = [(e["event"], e["name"]) for e in events(home.path, "allowed", "revoked")]
    assert noted == [("allowed", "north"), ("allowed", "south"), ("revoked", "south")]


def test_who_is_revoked_while_flower_is_told_of_others_does_not_stay(home, told):
    calls, meanwhile = told
    registry = server.Registry(home, AuditLog(home.path / "audit.jsonl"), insecure=False)
    meanwhile.append(lambda: home.members().revoke("north"))
    registry.follow()
    registry.follow()
    assert calls == ["register", "register", "unregister"]


def test_without_tls_flower_knows_nobody(home, told):
    server.Registry(home, AuditLog(home.path / "audit.jsonl"), insecure=True).follow()
    assert told[0] == []
