"""What a method's paper would do with clients that are absent, in a few lines each, against what it does.

The oracles name clients by id and compute in float64 from what was sent: a round's requests, and the
replies that counted.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from absent import ALL_OF_IT, CLIENTS, ROUNDS, SCHEDULES, Schedule, played
from fedloom.aggregation.assignment import assign_experts, infeasible, nearest_limits
from fedloom.aggregation.lora import factor_pairs
from fedloom.engines.in_process import SimulationEngine
from fedloom.errors import CheckpointError
from fedloom.experiment.experiment import Experiment
from fedloom.federation.presence import Membership, Presence
from fedloom.federation.protocol import Cohort
from fedloom.methods.bases.backbone_additions import ADDITION, ADDITIONS, BASE, MADE
from fedloom.methods.bases.packed_factors import FACTORS
from fedloom.methods.bases.packed_factors import unpack as unpack_factors
from fedloom.methods.bases.parameter_averaging import ADAPTER
from fedloom.methods.contract.method import by_place
from fedloom.methods.fedamole import (
    ASSIGNMENT,
    EMBEDDING,
    HELD_EXPERTS,
    PROJECTED,
    TOKENS,
    FedAMoLE,
    unpack,
)
from fedloom.methods.fedmoe import EXPERTS, USED
from fedloom.methods.scaffold import CONTROL
from fedloom.models.backbone_delta import MOVED
from fedloom.models.submixture import block_number
from fedloom.randomness import generator
from fedloom.tensors import State, by_client, part_of
from fedloom.wire.messages import Answer

EVERY = [
    ALL_OF_IT,
    *(pytest.param(own, marks=pytest.mark.slow, id=name) for name, own in SCHEDULES.items()),
]
by_schedule = pytest.mark.parametrize("schedule", EVERY)


@pytest.fixture
def play(suited):
    """Play a method by a schedule in one process."""

    def run(name, schedule, **sections):
        table = suited(name)
        federation = {"clients": CLIENTS, "rounds": ROUNDS, "quorum": 0.2}
        for section, own in {
            "training": {"local_steps": 1},
            "federation": federation,
            "data": {"builtin_rows": 40},
            **sections,
        }.items():
            table[section] = {**table[section], **own}
        return played(Experiment.from_table(table), schedule)

    return run


def mean(values, weights):
    return sum(w * v.double() for v, w in zip(values, weights, strict=True)) / sum(weights)


def rows(replies):
    return [reply.numbers["examples"] for _, reply in replies.values()]


def near(found, expected):
    return torch.allclose(found.double(), expected, atol=1e-6, rtol=0)


@pytest.mark.slow
@by_schedule
def test_fedavg_is_the_mean_of_who_answered(play, schedule):
    found = play("fedavg", schedule)
    for number, state in enumerate(found.states, 1):
        replies = found.of("train", number)
        assert replies.keys() == schedule.answering(number)
        for name, tensor in state.tensors.items():
            expected = mean([reply.tensors[name] for _, reply in replies.values()], rows(replies))
            assert near(tensor, expected)


@by_schedule
def test_scaffold_moves_c_by_all_changes_over_the_number_of_all_clients(play, schedule):
    """N is that of the paper: who has not come yet has c_k = 0, and who left stays with its last."""
    found = play("scaffold", schedule)
    state = part_of(found.states[0].tensors, ADAPTER)
    c = {name: torch.zeros_like(t, dtype=torch.float64) for name, t in state.items()}
    own = {k: dict(c) for k in range(CLIENTS)}
    for number in range(1, ROUNDS + 1):
        replies, before = found.of("train", number), dict(c)
        for k, (request, reply) in replies.items():
            x, y = part_of(request.tensors, ADAPTER), part_of(reply.tensors, ADAPTER)
            rate = request.numbers["learning_rate"]  # of one step
            for name in x:
                new = own[k][name] - before[name] + (x[name].double() - y[name].double()) / rate
                c[name] = c[name] + (new - own[k][name]) / CLIENTS
                own[k] = {**own[k], name: new}
        control = part_of(found.states[number - 1].tensors, CONTROL)
        assert all(torch.allclose(control[n].double(), c[n], atol=1e-5, rtol=1e-4) for n in c)
    for k in range(CLIENTS):  # what a client keeps is what the server has counted
        for name, tensor in found.kept(k, CONTROL).items():
            assert torch.allclose(tensor.double(), own[k][name], atol=1e-5, rtol=1e-4)
    assert any(t.abs().max() > 1e-3 for t in c.values())


def product(factors, a, b, scaling):
    return scaling * factors[b].double() @ factors[a].double()


def layer_of(name):
    return MOVED + name.partition(".lora_A.")[0]


@by_schedule
@pytest.mark.parametrize("method", ["flora", pytest.param("fedex_lora", marks=pytest.mark.slow)])
def test_the_backbone_takes_every_round_and_nobody_loses_one(play, method, schedule):
    found = play(method, schedule)
    scaling, like = found.parts.method.scaling, found.parts.initial
    base = {}
    for number, state in enumerate(found.states, 1):
        replies = found.of("train", number)
        assert replies.keys() == schedule.answering(number)  # back, it trains in the same round
        weights = rows(replies)
        sent = [reply.tensors for _, reply in replies.values()]
        if method == "flora":
            sent = [unpack_factors(tensors, like) for tensors in sent]
        for a, b in factor_pairs(sent[0]).values():
            whole = mean([product(own, a, b, scaling) for own in sent], weights)
            if method == "fedex_lora":
                means = {name: mean([own[name] for own in sent], weights) for name in (a, b)}
                whole = whole - product(means, a, b, scaling)
                assert near(part_of(state.tensors, ADAPTER)[a], means[a])
            base[layer_of(a)] = base.get(layer_of(a), 0) + whole
        server = part_of(state.tensors, BASE)
        assert all(near(server[name], base[name]) for name in base)
    up_to_date = schedule.answering(ROUNDS)
    for client in up_to_date:
        kept = found.kept(client, BASE)
        assert int(kept[ADDITIONS]) == ROUNDS
        assert all(torch.equal(kept[name], server[name]) for name in server)
    made = {n.removeprefix(MADE) for n in found.states[-1].numbers if n.startswith(MADE)}
    assert {int(client) for client in made} == set(range(CLIENTS)) - up_to_date


@pytest.mark.slow
def test_who_was_away_is_sent_what_it_lacks_or_the_sum_if_that_is_smaller(play):
    """A client of rank 4 makes 4 rows of 64 numbers for a layer of 1,024.

    Client 1 lacks those of three and two clients (1,280 numbers), client 0 those of two (512).
    """
    wide = {"rank": 4, "targets": ["q_proj"]}
    found = play("flora", Schedule(away={2: {1}, 3: {0, 1}}), adapter=wide)
    additions = [{n for n in state.tensors if n.startswith(ADDITION)} for state in found.states]
    assert additions == [
        set(),
        {f"{ADDITION}000002/{FACTORS}"},
        {f"{ADDITION}000003/{FACTORS}"},
        set(),
    ]
    assert found.states[2].numbers == {ADDITIONS: 3.0, f"{MADE}000000": 2.0, f"{MADE}000001": 1.0}
    assert set(found.of("catch_up", 4)) == {1}
    sent = [
        (client, request.numbers[ADDITIONS])
        for action, number, client, request, _ in found.seen
        if (action, number) == ("merge", 4)
    ]
    assert sent == [(0, 3.0), *((client, 4.0) for client in range(CLIENTS))]
    kept = [found.kept(client, BASE) for client in range(CLIENTS)]
    assert all(torch.equal(kept[2][name], own[name]) for own in kept for name in own)


@by_schedule
def test_fedamole_gives_each_client_the_experts_that_were_assigned_to_it(play, schedule):
    found = play("fedamole", schedule)
    method, like, left = found.parts.method, found.parts.initial, {}
    count, tokens, adapter = len(method.layers), {}, like
    projected = torch.zeros(count, method.experts, method.rank, dtype=torch.float64)
    for number, state in enumerate(found.states, 1):
        # Drawn for all four, whoever is there; by embeddings for those that have sent some.
        drawn = generator(0, "assignment", round=number - 1).random(
            (count, method.experts, CLIENTS)
        )
        # Who leaves before this round was still assigned experts after the round before.
        there = [c for c in range(CLIENTS) if c not in schedule.gone(max(1, number - 1))]
        for layer in range(count):
            scores = {c: drawn[layer, :, c] for c in there}
            for c in tokens.keys() & set(there):
                scores[c] = (projected[layer] @ tokens[c][layer]).numpy() / np.sqrt(method.rank)
            relevance = np.exp(np.stack([scores[c] for c in there], 1))
            shares = relevance / relevance.sum(1, keepdims=True)
            limits = nearest_limits(method.experts, len(there), 2, 8, 2)
            held = dict(zip(there, assign_experts(shares, *limits).T, strict=True))
            for client, (request, _) in found.of("train", number).items():
                assert request.tensors[HELD_EXPERTS][layer].bool().tolist() == held[client].tolist()
        replies = found.of("train", number)
        sent = {
            c: unpack({**r.tensors, HELD_EXPERTS: q.tensors[HELD_EXPERTS]}, method.layers, like)
            for c, (q, r) in replies.items()
        }
        for request, _ in replies.values():
            had = unpack(request.tensors, method.layers, like)
            assert all(torch.equal(tensor, adapter[name]) for name, tensor in had.items())
        after = part_of(state.tensors, ADAPTER)
        for name, tensor in after.items():
            some = [own[name] for own in sent.values() if name in own]
            expected = mean(some, [1.0] * len(some)) if some else adapter[name].double()
            assert near(tensor, expected)
        adapter = after
        sums, holders = torch.zeros_like(projected), torch.zeros(*projected.shape[:2], 1)
        for client, (request, reply) in replies.items():
            own = request.tensors[HELD_EXPERTS].bool()
            tokens[client] = reply.tensors[TOKENS].double()
            sums[own] += reply.tensors[PROJECTED].double()
            holders[own] += 1
        projected = (
            torch.where(holders > 0, sums / holders.clamp(min=1), projected).float().double()
        )
        left |= dict.fromkeys(schedule.gone(number))
    sent = {client for own in range(1, ROUNDS + 1) for client in found.of("train", own)}
    kept = by_client(found.states[-1].tensors, EMBEDDING)
    assert kept.keys() == sent - schedule.gone(ROUNDS)
    last = found.records[-1].details["experts"]  # by which the page places all that ever held any
    assert last["clients"] == list(range(CLIENTS)) and len(last["similarity"]) == CLIENTS
    assert set(by_client(found.states[-1].tensors, ASSIGNMENT)) >= set(range(CLIENTS)) - left.keys()


@by_schedule
def test_fedmoe_gives_each_client_the_experts_of_its_own_probe(play, schedule):
    found = play("fedmoe", schedule)
    method, held, adapter = found.parts.method, {}, found.parts.initial
    for number, state in enumerate(found.states, 1):
        for client, (_, reply) in found.of("probe", number).items():
            assert client not in held  # once
            held[client] = reply.tensors[USED].float().topk(method.held, 1).indices.sort(1).values
        replies = found.of("train", number)
        assert replies.keys() == schedule.answering(number)
        after = part_of(state.tensors, ADAPTER)
        for name, tensor in after.items():
            block = block_number(name, method.blocks)
            for client, (request, _) in replies.items():
                assert torch.equal(request.tensors[name], adapter[name][held[client][block]])
            for expert in range(len(tensor)):
                some = [
                    (
                        reply.tensors[name][held[client][block].tolist().index(expert)],
                        reply.numbers["examples"],
                    )
                    for client, (_, reply) in replies.items()
                    if expert in held[client][block]
                ]
                expected = (
                    mean(*zip(*some, strict=True)) if some else adapter[name][expert].double()
                )
                assert near(tensor[expert], expected)
        adapter = after
        kept = by_client(state.tensors, EXPERTS)
        assert kept.keys() == held.keys()
        assert all(torch.equal(own, held[client]) for client, own in kept.items())


@pytest.mark.slow
def test_fdlora_makes_a_private_adapter_of_each_client_when_it_first_comes(play):
    found = play("fdlora", SCHEDULES["comes late"])
    begun = [(number, client) for action, number, client, _, _ in found.seen if action == "start"]
    assert sorted(begun) == [(1, 0), (1, 1), (1, 2), (3, 3)]
    assert found.kept(3, "private").keys() == found.kept(0, "private").keys() != set()


def test_limits_give_way_to_fewer_clients_as_little_as_they_must():
    assert nearest_limits(6, 4, 2, 4, 2) == (2, 4, 2)  # 12 placements on 4 clients: 2 to 4 each
    assert nearest_limits(6, 2, 2, 4, 2) == (2, 6, 2)  # on 2 clients 6 each, above the 4 allowed
    assert nearest_limits(6, 1, 2, 4, 2) == (1, 6, 2)  # a single client is the only holder
    assert nearest_limits(4, 4, 2, 8, 3) == (2, 8, 2)  # 8 placements on 4 clients: 2 each at least
    for experts in range(1, 7):
        for clients in range(1, 7):
            for asked in ((1, 1, 1), (2, 3, 2), (5, 2, 1), (3, 8, 6)):
                found = nearest_limits(experts, clients, *asked)
                assert infeasible(experts, clients, *found) == []
                if not infeasible(experts, clients, *asked):
                    assert found == asked


@pytest.mark.slow
def test_a_round_says_which_limits_gave_way_to_clients_that_left(play):
    method = {"max_experts_per_client": 3}
    found = play("fedamole", Schedule(left={1: 3, 2: 3}), method=method)
    notes = [{n: v for n, v in r.train.items() if "experts_per" in n} for r in found.records]
    assert notes == [{}, {}, {"max_experts_per_client": 4.0}, {}]  # 4 experts twice on 2 clients


def test_state_by_place_of_an_earlier_release_is_read_by_id_or_refused():
    presence = Presence.of({0: 5, 3: 5, 7: 5})
    held = torch.arange(12, dtype=torch.uint8).reshape(2, 2, 3)
    own = SimpleNamespace(layers=("a", "b"), experts=2, rank=4)
    tokens = torch.arange(24.0).reshape(2, 3, 4)
    tensors = {
        "held": held,
        "tokens": tokens,
        "known": torch.tensor([1, 0, 1]),
        "projected": torch.ones(2, 2, 4),
    }
    known = FedAMoLE._client_records(own, State(tensors), presence)
    assert known.assigned[7].tolist() == [[2, 5], [8, 11]] and known.tokens.keys() == {0, 7}
    assert known.tokens[7].tolist() == [[8.0, 9.0, 10.0, 11.0], [20.0, 21.0, 22.0, 23.0]]
    with pytest.raises(CheckpointError) as error:
        by_place(held, 2, Presence.of({0: 5, 3: 5}))
    assert str(error.value) == (
        "the checkpoint keeps what it knows of 3 clients by their place, as fedloom did before, and 2 "
        "take part: whose it is cannot be told; start a new run"
    )


def test_who_is_there_is_told_apart_and_survives_a_checkpoint():
    everybody = Membership((1, 4, 6, 9), rows={1: 10, 4: 20, 9: 5})
    first = Presence().begun(1, everybody, {1, 4, 9}, {})
    assert first.members == first.enrolled == (1, 4, 6, 9) and first.available == (1, 4, 9)
    closed = first.closed(1, {1, 4}, {9})
    assert (
        closed.answered_last == {1: 1, 4: 1} and closed.interrupted == frozenset()
    )  # 9 never answered
    without = Membership((1, 4, 6, 9), frozenset({9}), {6: 7})
    second = Presence.from_table(closed.to_table()).begun(2, without, {1, 6, 9}, {1: 5})
    assert second.members == (1, 4, 6) and second.enrolled == (1, 4, 6, 9)
    assert second.available == (6,) and second.suspended == {1: 5} and second.left == {9: 2}
    assert second.rows == {1: 10, 4: 20, 6: 7, 9: 5} and second.interrupted == {1, 4}
    third = second.closed(2, {6}, set()).begun(3, without, {1, 4, 6}, {})
    assert third.left == {9: 2} and third.answered_last == {1: 1, 4: 1, 6: 2}
    cohort = Cohort(3, (4, 6), third, 0.1)
    assert cohort.returned == (4,) and cohort.sizes == {1: 10, 4: 20, 6: 7}
    last = third.closed(3, {4}, {6})
    assert last.interrupted == {1, 6} and last.answered_last == {1: 1, 4: 3, 6: 2}
    assert Presence.assumed(everybody, 2).answered_last == {1: 2, 4: 2, 6: 2, 9: 2}


@pytest.mark.slow
def test_a_sequential_split_run_stands_by_its_last_average_where_all_that_had_steps_left_are_lost(
    suited, monkeypatch
):
    table = suited("split")
    table["federation"] |= {"clients": 2, "rounds": 1, "quorum": 0.5}
    table["training"] = {"learning_rate": 1e-3, "batch_size": 4}
    table["partition"] = {"kind": "size", "sizes": [1.0, 3.0]}
    table["method"] |= {"average_every": 2}
    started, plain = [], SimulationEngine.answer

    def answer(self, exchange, client):
        started.append((exchange.action, client))
        if client == 1 and started.count(("start", 1)) == 2:
            return Answer(client, error="the line went dead")
        return plain(self, exchange, client)

    monkeypatch.setattr(SimulationEngine, "answer", answer)
    found = played(Experiment.from_table(table), Schedule())
    assert started.count(("start", 0)) == 1 and found.records[0].rejected == {
        1: "the line went dead"
    }
    assert part_of(found.states[0].tensors, "back")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["regmean", "lora_fair", "fedawa", "fedmap"])
def test_weights_and_closed_forms_are_of_who_answered(play, method):
    found, schedule, came = play(method, ALL_OF_IT), ALL_OF_IT, set()
    for number, state in enumerate(found.states, 1):
        replies = found.of("train", number)
        assert replies.keys() == schedule.answering(number)
        assert all(torch.isfinite(tensor).all() for tensor in state.tensors.values())
        came |= replies.keys()
        if method == "fedawa":
            assert state.numbers.keys() == {f"logit/{client:06d}" for client in came}
        if method == "fedmap":
            answers = [part_of(reply.tensors, ADAPTER) for _, reply in replies.values()]
            for name, tensor in part_of(state.tensors, ADAPTER).items():
                own = torch.stack([answer[name] for answer in answers])
                assert (tensor <= own.amax(0) + 1e-6).all() and (tensor >= own.amin(0) - 1e-6).all()
    straight, backwards = (play(method, Schedule(backwards=own)) for own in (False, True))
    for one, other in zip(straight.states, backwards.states, strict=True):
        assert one.digest() == other.digest()
