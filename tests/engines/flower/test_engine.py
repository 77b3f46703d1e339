"""Who counts as there, without any machine: what is carried is in ``test_contract.py``."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from fedloom.accounting.ledger import Ledger
from fedloom.engines.flower.engine import FlowerEngine
from fedloom.engines.flower.run_clients import UNSEEN, RunClients
from fedloom.errors import RoundFailed
from fedloom.federation.engine import RunDescription
from fedloom.federation.participants import FederationSettings
from fedloom.federation.records import Participant
from fedloom.security.client_registry import Members
from fedloom.security.keys import make_key
from fedloom.wire.envelope import Joined
from fedloom.wire.messages import Exchange
from fedloom.wire.schema import Schema


class Open(set):
    """Streams that are open, by client."""

    def drop(self, client):
        self.discard(client)


@pytest.fixture
def there(tmp_path):
    """An engine of three clients, of whom some have joined and have a stream open."""

    def make(joined, newcomers=(), **federation):
        members = Members(tmp_path / "members.toml")
        for client in range(3):
            public = make_key(tmp_path / f"{client}.key").read_text()
            members.allow(f"site-{client}", public)
        roster = RunClients(
            lambda: Members(tmp_path / "members.toml"),
            [Participant(client, f"site-{client}") for client in range(3)],
            newcomers,
            owners=lambda: {20: 2},
        )
        for client in joined:
            roster.registered[client] = Joined(rows=10 + client, held_out=0, model="m", version="1")
        post = SimpleNamespace(online=set, open_streams=None, receive=lambda ids: ())
        settings = FederationSettings(clients=3, patience=0.05, **federation)
        engine = FlowerEngine(post, settings, roster)
        engine._streams, engine._run_description = (
            Open(joined),
            RunDescription("0" * 32, "", (), "m", (-1,)),
        )
        return engine, members

    return make


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("fedloom.engines.flower.engine.LOOK", 0.001)
    monkeypatch.setattr(FlowerEngine, "_streamed", lambda self, waiting: ())


def test_a_revoked_client_is_drawn_no_more_and_its_stream_closed(there):
    engine, members = there([0, 1, 2])
    assert engine.sizes() == {0: 10, 1: 11, 2: 12}
    members.revoke("site-1")
    assert engine.sizes() == {0: 10, 2: 12} and engine._streams == {0, 2}


def test_a_newcomer_makes_no_quorum(there):
    engine, _ = there([2], newcomers=(2,), clients_per_round=1)
    with pytest.raises(RoundFailed, match="0 of 2 clients were ready within"):
        engine.sizes()


def test_one_answer_of_a_node_is_enough_whichever_it_is(there, monkeypatch):
    """A node of Flower can come to answer each message with what it had to say to the one before."""
    engine, _ = there([])
    pushed, told = [], []

    def welcome(node, found, asked):
        told.append((node, found, asked.number))
        engine.run_clients.nodes[2] = node

    monkeypatch.setattr(engine.run_clients, "register", welcome)
    monkeypatch.setattr("fedloom.engines.flower.run_clients.SILENT", 0.0)
    engine.transport.send = lambda node, header, payload: (
        pushed.append(node) or f"id-{header.number}"
    )
    engine.transport.online = lambda: {20}
    engine.transport.receive = lambda ids: [("id-1", "an answer")] if len(pushed) > 1 else []
    engine._meet()
    assert pushed == [20] and not told
    engine._meet()
    assert pushed == [20, 20] and told == [(20, "an answer", 1)]
    engine._meet()
    assert pushed == [20, 20] and engine._registering == {}


def test_a_run_begins_as_soon_as_newcomers_and_all_others_are_there(there, monkeypatch):
    engine, _ = there([0, 1, 2], newcomers=(2,))
    monkeypatch.setattr("fedloom.engines.flower.engine.time.sleep", None)  # it would have to wait
    engine._wait_for({0, 1, 2}, 3, 3, "federation.require")
    assert engine.sizes() == {0: 10, 1: 11}


def test_who_answers_ends_the_wait_and_who_was_not_asked_does_not(there, monkeypatch):
    """Answers are looked for half of the time; without any, a wait is as long as it ever was."""
    clock, told = SimpleNamespace(now=0.0, answer=0.0), []
    monkeypatch.setattr("fedloom.engines.flower.engine.LOOK", 1.0)
    monkeypatch.setattr(
        "fedloom.engines.flower.engine.time",
        SimpleNamespace(
            monotonic=lambda: clock.now,
            sleep=lambda seconds: setattr(clock, "now", clock.now + seconds),
        ),
    )
    engine, _ = there([0])
    looked = []

    def receive(ids):
        looked.append(round(clock.now, 1))
        clock.now += 0.1
        return [("id-0", "an answer")] if clock.now > clock.answer else []

    engine.transport.receive = receive
    engine.run_clients.register = lambda *said: told.append(said)
    for pending, answer, ends, looks in (
        (False, 9.0, 1.0, []),
        (True, 9.0, 1.0, [0.0, 0.2, 0.4, 0.6, 0.8]),
        (True, 0.25, 0.3, [0.0, 0.2]),
    ):
        clock.now, clock.answer, looked[:] = 0.0, answer, []
        engine._registering = {"id-0": (20, "asked")} if pending else {}
        engine._pause()
        assert clock.now == pytest.approx(ends) and looked == looks
    assert told == [(20, "an answer", "asked")]


@pytest.mark.parametrize(("require", "needed"), [("all", 3), (2, 2), (0.5, 2), (1, 1), (0.01, 1)])
def test_a_run_begins_without_nobody_that_is_required(there, require, needed):
    engine, _ = there([0], require=require)
    assert engine.federation.required == needed
    if needed == 1:
        engine.begin(engine.run_description, Ledger())
        assert engine.sizes() == {0: 10}
        return
    with pytest.raises(RoundFailed) as failed:
        engine.begin(engine.run_description, Ledger())
    asks = f"federation.patience = 0.05 seconds, federation.require asks for {needed}"
    assert f"1 of 3 clients were ready within {asks}" in str(failed.value)
    assert "site-1 (client 1): not connected" in str(failed.value)
    assert "site-2 (client 2): not connected" in str(failed.value)


def test_what_was_discarded_is_told_until_its_client_is_asked_again(there):
    """Also where answers are taken one by one, and another client's is discarded in between."""
    engine, _ = there([])
    engine.transport.budget = SimpleNamespace(limit=0)
    for client in (0, 1):
        engine.submit(Exchange("train", 1 + client, Schema(), Schema(), {client: b""}))
        assert engine.next_answer().client == client
        engine.discard([client])
        engine.discard([])  # an exchange of which nothing is discarded
    assert engine._header("exchange", 0).undone == [[1, 1]]
    assert engine._header("exchange", 1).undone == [[1, 2]]


def test_who_is_waited_for_is_said_now_and_then(there, monkeypatch):
    engine, _ = there([0, 1])
    said = []
    monkeypatch.setattr("fedloom.engines.flower.engine.NOTICE", 0.01)
    engine._run_description = replace(engine.run_description, warn=said.append)
    with pytest.raises(RoundFailed):
        engine.begin(engine.run_description, Ledger())
    assert len(said) >= 2
    assert set(said) == {f"waiting for site-2 (client 2): {UNSEEN}"}
