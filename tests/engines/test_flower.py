"""Who counts as there, without any machine: what is carried is in ``test_contract.py``."""

from types import SimpleNamespace

import pytest

from fedloom.engines.flower import FlowerEngine
from fedloom.engines.roster import Roster
from fedloom.envelope import Joined
from fedloom.errors import RoundFailed
from fedloom.identity import Members, make_key
from fedloom.server import Briefing, FederationSettings


class Open(set):
    """Streams that are open, by client."""

    def drop(self, client):
        self.discard(client)


@pytest.fixture
def there(tmp_path):
    """An engine of three clients, of whom some have joined and have a stream open."""

    def make(joined, newcomers=(), **federation):
        members = Members(tmp_path / "clients.toml")
        for client in range(3):
            public = make_key(tmp_path / f"{client}.key").read_text()
            members.allow(f"site-{client}", public)
        roster = Roster(lambda: Members(tmp_path / "clients.toml"), newcomers)
        for client in joined:
            roster.joined[client] = Joined(rows=10 + client, held_out=0, model="m", version="1")
        post = SimpleNamespace(online=set, open_streams=None, pull=lambda ids: ())
        settings = FederationSettings(clients=3, patience=0.05, **federation)
        engine = FlowerEngine(post, settings, roster)
        engine._streams, engine._briefing = Open(joined), Briefing("0" * 32, "", (), "m", (-1,))
        return engine, members

    return make


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("fedloom.engines.flower.LOOK", 0.001)
    monkeypatch.setattr(FlowerEngine, "_streamed", lambda self, waiting: ())


def test_a_revoked_client_is_drawn_no_more_and_its_stream_closed(there):
    engine, members = there([0, 1, 2])
    assert engine.sizes() == {0: 10, 1: 11, 2: 12}
    members.revoke("site-1")
    assert engine.sizes() == {0: 10, 2: 12} and engine._streams == {0, 2}


def test_a_newcomer_makes_no_quorum(there):
    engine, _ = there([2], newcomers=(2,), clients_per_round=1)
    with pytest.raises(RoundFailed, match="0 of 3 clients were ready within"):
        engine.sizes()


def test_one_answer_of_a_node_is_enough_whichever_it_is(there, monkeypatch):
    """A node of Flower can come to answer each message with what it had to say to the one before."""
    engine, _ = there([])
    pushed, told = [], []

    def welcome(node, found, asked):
        told.append((node, found, asked.number))
        engine.roster.nodes[2] = node

    monkeypatch.setattr(engine.roster, "welcome", welcome)
    monkeypatch.setattr("fedloom.engines.roster.SILENT", 0.0)
    engine.post.push = lambda node, header, payload: pushed.append(node) or f"id-{header.number}"
    engine.post.online = lambda: {20}
    engine.post.pull = lambda ids: [("id-1", "an answer")] if len(pushed) > 1 else []
    engine._meet()
    assert pushed == [20] and not told
    engine._meet()
    assert pushed == [20, 20] and told == [(20, "an answer", 1)]
    engine._meet()
    assert pushed == [20, 20] and engine._joining == {}


def test_a_run_begins_as_soon_as_newcomers_and_all_others_are_there(there, monkeypatch):
    engine, _ = there([0, 1, 2], newcomers=(2,))
    monkeypatch.setattr("fedloom.engines.flower.time.sleep", None)  # it would have to wait
    engine._wait_for(3, {2})
    assert engine.sizes() == {0: 10, 1: 11}
