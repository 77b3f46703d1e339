"""What the server lets in, whom it asks, and when it stops."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fedloom.accounting.ledger import Ledger
from fedloom.errors import RoundFailed
from fedloom.federation.admission import Admission
from fedloom.federation.participants import FederationSettings
from fedloom.federation.presence import Membership
from fedloom.federation.records import Absence, Evaluation
from fedloom.federation.rounds import Server
from fedloom.methods.bases.parameter_averaging import EXAMPLES, LEARNING_RATE, training_exchange
from fedloom.methods.fedavg import FedAvg, FedAvgSettings
from fedloom.tensors import State
from fedloom.wire.messages import Answer, Exchange, Payload
from fedloom.wire.schema import LOSS, Schema
from unchecked import encode_anything

START = {"w": torch.zeros(2, 3)}
REQUEST = Schema.of(START, (LEARNING_RATE,))
REPLY = Schema.of(START, (EXAMPLES,), (LOSS,))
SIZES = {0: 10, 1: 10, 2: 10}


def answer(client, value=1.0, examples=10, tensors=None, schema=REPLY):
    tensors = {"w": torch.full((2, 3), float(value))} if tensors is None else tensors
    return Answer(client, encode_anything(Payload(tensors, {"examples": examples}), schema))


def exchange(clients=(0, 1, 2)):
    payload = Payload(START, {"learning_rate": 0.1})
    return Exchange.broadcast("train", 1, clients, payload, REQUEST, REPLY)


def of_shape(*shape, dtype=torch.float32):
    tensors = {"w": torch.ones(shape, dtype=dtype)}
    return answer(1, tensors=tensors, schema=Schema.of(tensors, (EXAMPLES,), (LOSS,)))


BAD = {
    "NaN": answer(1, float("nan")),
    "infinity": answer(1, float("inf")),
    "1e30": answer(1, 1e30),
    "an extra tensor": answer(
        1,
        tensors={"w": torch.ones(2, 3), "v": torch.ones(1)},
        schema=Schema.of({"w": torch.ones(2, 3), "v": torch.ones(1)}, (EXAMPLES,), (LOSS,)),
    ),
    "another name": answer(
        1,
        tensors={"v": torch.ones(2, 3)},
        schema=Schema.of({"v": torch.ones(2, 3)}, (EXAMPLES,), (LOSS,)),
    ),
    "no tensor": answer(1, tensors={}, schema=Schema((), (EXAMPLES,), (LOSS,))),
    "bf16": of_shape(2, 3, dtype=torch.bfloat16),
    "wrong shape": of_shape(3, 3),
    "broadcastable shape": of_shape(1, 3),
    "fp16": of_shape(2, 3, dtype=torch.float16),
    "int8": of_shape(2, 3, dtype=torch.int8),
    "complex": Answer(1, b"\0" * 60),
    "weight negative": answer(1, examples=-9),
    "weight zero": answer(1, examples=0),
    "weight inflated": answer(1, examples=1e18),
    "weight above its rows": answer(1, examples=11),
    "no bytes": Answer(1, b""),
    "an error": Answer(1, error="it fell over"),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_a_bad_answer_is_left_out_with_a_reason_and_the_others_count(bad):
    replies, rejected = Admission().accept([answer(0), bad, answer(2)], exchange(), SIZES)
    assert [reply.client for reply in replies] == [0, 2]
    assert list(rejected) == [1] and rejected[1]


def test_replies_come_in_client_order_and_count_once():
    answers = [answer(2), answer(0, 1.0), answer(0, 5.0), answer(7), answer(1)]
    replies, rejected = Admission().accept(answers, exchange(), SIZES)
    assert [reply.client for reply in replies] == [0, 1, 2] and not rejected
    assert replies[0].payload.tensors["w"][0, 0] == 1.0


def test_a_client_that_says_nothing_is_named():
    assert Admission().accept([answer(0)], exchange(), SIZES)[1] == {1: "no answer", 2: "no answer"}


class Engine:
    """Clients that add their number to what they receive; some are broken."""

    def __init__(self, clients=3, broken=()):
        self.clients, self.broken, self.asked = clients, broken, []

    def sizes(self):
        return dict.fromkeys(range(self.clients), 10)

    def exchange(self, exchange):
        self.asked.append(tuple(exchange.requests))
        for client in reversed(exchange.requests):
            yield (
                Answer(client, error="broken") if client in self.broken else answer(client, client)
            )

    def discard(self, clients):
        """They keep nothing."""

    def membership(self):
        return Membership(tuple(range(self.clients)), rows=dict.fromkeys(range(self.clients), 10))

    def absent(self):
        return {}

    def title(self, client):
        return f"client {client}"


def server(engine, **settings):
    records = []
    observer = SimpleNamespace(
        client_done=lambda *a: None, round_done=lambda r: None, warning=lambda t: None
    )
    built = Server(
        FedAvg(FedAvgSettings()),
        engine,
        FederationSettings(**{"rounds": 2, "clients": 3, **settings}),
        lambda round: 0.1,
        lambda state, round: Evaluation({"m": float(state.tensors["w"][0, 0])}),
        lambda record, state: records.append(record),
        Ledger(),
        observer,
    )
    return built, records


def test_rounds_are_recorded_from_the_start_on():
    built, records = server(Engine())
    state = built.run(State(START))
    assert state.tensors["w"][0, 0] == 1.0  # the mean of 0, 1 and 2
    assert [record.round for record in records] == [0, 1, 2]
    assert [record.evaluation.metrics["m"] for record in records] == [0.0, 1.0, 1.0]


def test_a_broken_client_is_left_out_while_the_quorum_stands():
    built, records = server(Engine(broken={0}))
    assert built.run(State(START)).tensors["w"][0, 0] == 1.5
    assert records[1].rejected == {0: "broken"}


def test_below_the_quorum_the_run_stops_and_says_why():
    built, records = server(Engine(broken={0, 1}))
    with pytest.raises(
        RoundFailed, match=r"round 1: 1 of 3 clients .* asks for 2\. client 0, client 1: broken"
    ):
        built.run(State(START))
    assert [record.round for record in records] == [0]


def test_who_is_missing_is_recorded_each_round_and_told_when_it_changes():
    class Missing(Engine):
        def absent(self):
            when = {1: {2: Absence(5.0, "it is away")}, 2: {2: Absence(5.0, "it is away")}}
            when[3] = {2: Absence(5.0, "no rows")}
            return when.get(len(self.asked) + 1, {})

        def sizes(self):
            return dict.fromkeys({0, 1, 2} - self.absent().keys(), 10)

    told = []
    built, records = server(Missing(), rounds=4)
    built.observer.warning = told.append
    built.run(State(START))
    assert [{c: own.reason for c, own in r.absent.items()} for r in records] == [
        {}, {2: "it is away"}, {2: "it is away"}, {2: "no rows"}, {},
    ]  # fmt: skip
    assert [len(record.clients) for record in records] == [0, 2, 2, 2, 3]
    assert told == [
        "round 1 begins without client 2: it is away",
        "round 3 begins without client 2: no rows",
        "client 2 is back in round 4",
    ]


def test_cohorts_are_drawn_from_seed_and_round_alone():
    def asked(done=-1, **settings):
        engine = Engine(10)
        built, _ = server(engine, rounds=6, clients=10, clients_per_round=3, **settings)
        built.run(State(START), done)
        return engine.asked

    first = asked()
    assert len(set(first)) > 1 and all(len(set(cohort)) == 3 for cohort in first)
    assert asked() == first
    assert asked(done=3) == first[3:]
    assert asked(seed=1) != first


def test_a_thousand_orders_of_arrival_give_the_same_bits():
    """Sums are in client order whoever came first, and second and unasked answers count for nothing."""
    rng = np.random.default_rng(0)
    values = {client: rng.normal() for client in range(8)}
    sizes = {client: int(rng.integers(1, 100)) for client in range(8)}
    answers = [answer(c, values[c], sizes[c]) for c in range(8)]
    answers += [answer(9, 5.0), Answer(3, error="late"), answer(2, values[2], sizes[2])]

    class Shuffled(Engine):
        def sizes(self):
            return sizes

        def membership(self):
            return Membership(tuple(sizes), rows=sizes)

        def exchange(self, exchange):
            first = [a for a in answers if not (a.client == 3 and a.data is None)]
            order = rng.permutation(len(first))
            yield from (first[i] for i in order)
            yield answers[-2]

    digests = set()
    for _ in range(1000):
        built, _ = server(Shuffled(8), rounds=1, clients=8)
        digests.add(built.run(State(START)).digest())
    assert len(digests) == 1


class Greeting(FedAvg):
    """Asks client 0 something before it trains: in every round, or in those that it is drawn for."""

    def __init__(self, always):
        self.always = always

    def round(self, state, cohort):
        training = training_exchange(cohort, state.tensors)
        asked = {0: next(iter(training.requests.values()))}
        if self.always or 0 in cohort.clients:
            yield replace(training, action="greet", requests=asked)
        replies = yield training
        return State(replies[0].payload.tensors)


@pytest.mark.parametrize(("always", "replaced"), [(True, (0,)), (False, ())])
def test_a_round_that_begins_with_a_question_to_some_replaces_who_is_lost(always, replaced):
    """Who is drawn instead is asked what is left; a round that would now begin otherwise goes on as it is."""
    engine = Engine(4, broken={0})
    built, records = server(engine, rounds=6, clients=4, clients_per_round=2, replacements=1)
    replace(built, method=Greeting(always)).run(State(START))
    lost = [own for own in records if 0 in own.rejected and own.round]
    drawn = [own for own in lost if own.replaced or not always]
    assert drawn and all(own.replaced == replaced for own in drawn if 0 in own.rejected)
    for own in drawn:
        assert (0 in own.clients) is not always and len(own.clients) == 2
    assert all(len(asked) == 2 for asked in engine.asked if asked != (0,))
