"""FedAMoLE: who holds what, means over holders, bytes by assignment, absent and failing clients."""

import dataclasses
import json
import math
import re
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import fedloom
from fedloom.aggregation.assignment import relevance_of, softmax
from fedloom.engines.in_process import SimulationEngine
from fedloom.errors import DataError, Interrupted, MessageError, ModelError, SettingsError
from fedloom.federation.presence import Presence
from fedloom.federation.protocol import Cohort
from fedloom.methods.bases.parameter_averaging import ADAPTER
from fedloom.methods.fedamole import (
    ASSIGNMENT,
    EMBEDDING,
    HELD_EXPERTS,
    PROJECTED,
    SHARES,
    TOKENS,
    ClientRecords,
    FedAMoLE,
    FedAMoLESettings,
    Probed,
    _check_shares,
    is_domain,
    pack,
    unpack,
)
from fedloom.privacy.gaussian import ad_hoc_noise, noise_multiplier
from fedloom.randomness import generator
from fedloom.reports.sections.expert_assignment import history
from fedloom.runs.export import export
from fedloom.runs.observers import Silent
from fedloom.runs.records import partition_record
from fedloom.runs.run import resume_run
from fedloom.tensors import by_client, part_of
from fedloom.wire.messages import Answer, Payload, Reply, decode, encode

MIXTURE = {
    "data": {"source": "builtin:preferences", "builtin_rows": 60},
    "partition": {"kind": "column", "column": "domain", "client_test_fraction": 0.2},
    "federation": {"clients": 4, "rounds": 3},
    "adapter": {"kind": "experts", "rank": 2, "alpha": 4.0, "experts": 6},
    "training": {"learning_rate": 1e-2},
}
METHOD = {"name": "fedamole", "clients_per_expert": 2, "max_experts_per_client": 4}


@pytest.fixture
def messages(monkeypatch):
    """Every request and answer of training, decoded: (round, client, request, reply)."""
    seen = []
    plain = SimulationEngine.answer

    def answer(self, exchange, client):
        found = plain(self, exchange, client)
        if exchange.action == "train":
            assert found.error is None, found.error
            request = decode(exchange.requests[client], exchange.request_schema)
            seen.append(
                (exchange.round, client, request, decode(found.data, exchange.reply_schema))
            )
        return found

    monkeypatch.setattr(SimulationEngine, "answer", answer)
    return seen


@pytest.fixture
def usual(experiment, federate, messages, once):
    """A run that several tests look at, and its messages."""
    return once("usual", lambda: (federate(experiment(method=METHOD, **MIXTURE)), list(messages)))


def of_round(messages, round):
    return {c: (request, reply) for r, c, request, reply in messages if r == round}


def test_every_round_keeps_the_limits_and_everyone_is_judged_by_its_own(
    experiment, federate, messages
):
    found = federate(experiment(method=METHOD, **MIXTURE), evaluate=True)
    layers = found.parts.method.layers
    for round in (1, 2, 3):
        own = of_round(messages, round)
        held = torch.stack([own[c][0].tensors[HELD_EXPERTS] for c in range(4)], -1)
        assert held.shape == (len(layers), 6, 4)
        assert (held.sum(2) == 2).all()
        assert held.sum(1).min() >= 2 and held.sum(1).max() <= 4
    changed = [
        (
            of_round(messages, 1)[c][0].tensors[HELD_EXPERTS]
            != of_round(messages, 2)[c][0].tensors[HELD_EXPERTS]
        ).any()
        for c in range(4)
    ]
    assert any(changed)
    losses = {m["loss"] for m in found.records[-1].evaluation.clients.values()}
    assert len(losses) == 4
    for client in range(4):
        kept = found.parts.engine.store.slots(client)[ADAPTER]
        counts = of_round(messages, 3)[client][0].tensors[HELD_EXPERTS].sum(1).tolist()
        for layer, count in zip(layers, counts, strict=True):
            assert sum(is_domain(n) and n.startswith(f"{layer}.") for n in kept) == 2 * count


def test_an_expert_is_the_mean_of_its_holders_and_what_all_have_the_mean_of_all(usual):
    found, messages = usual
    layers, like = found.parts.method.layers, found.parts.initial
    own = of_round(messages, 3)
    sent = {
        c: unpack({**reply.tensors, HELD_EXPERTS: request.tensors[HELD_EXPERTS]}, layers, like)
        for c, (request, reply) in own.items()
    }
    final = part_of(found.state.tensors, ADAPTER)
    assert final.keys() == like.keys()
    for name, tensor in final.items():
        some = [tensors[name] for tensors in sent.values() if name in tensors]
        assert len(some) == (2 if is_domain(name) else 4)
        assert torch.allclose(tensor, torch.stack(some).mean(0), atol=1e-6)
    projected = found.state.tensors[PROJECTED]
    layer, expert = 0, 3
    rows = []
    for request, reply in own.values():
        held = request.tensors[HELD_EXPERTS]
        if held[layer, expert]:
            rows.append(reply.tensors[PROJECTED][int(held[layer, :expert].sum())])
    assert torch.allclose(projected[layer, expert], torch.stack(rows).mean(0), atol=1e-6)
    embeddings = by_client(found.state.tensors, EMBEDDING)
    for c, (_, reply) in own.items():
        assert torch.equal(embeddings[c], reply.tensors[TOKENS])


def test_bytes_are_the_closed_form_of_each_clients_assignment(usual):
    found, messages = usual
    shapes = found.parts.model.layers
    rank, sizes = 2, set()
    form = found.parts.method.traffic(part_of(found.state.tensors, ADAPTER))
    for round in (1, 2, 3):
        means = [0.0, 0.0]
        for client, (request, _) in of_round(messages, round).items():
            held = request.tensors[HELD_EXPERTS].sum(1).tolist()
            down, up = len(shapes) * 6, 4 * rank * len(shapes)
            for (_, layer), count in zip(shapes.items(), held, strict=True):
                own = rank * (layer.inputs + layer.outputs)
                both = 4 * (own * (1 + count) + rank * layer.inputs)
                down, up = down + both, up + both + 4 * (rank + 1) * count
            cost = next(c for c in found.costs(client, round - 1) if c.phase == "train")
            assert 0 <= cost.bytes_down - down < 1000
            assert 0 <= cost.bytes_up - up < 1000
            sizes.add(down)
            means = [mean + own / 4 for mean, own in zip(means, (down, up), strict=True)]
        assert (form.down, form.up) == pytest.approx(
            means, abs=1
        )  # each expert has as many clients
    assert len(sizes) > 1


@pytest.mark.parametrize(
    ("change", "moves"),
    [({"assignment": "random"}, True), ({"assignment": "static"}, False)],
)
def test_ablations_draw_in_every_round_or_once(experiment, federate, messages, change, moves):
    federate(experiment(method={**METHOD, **change}, **MIXTURE))
    held = [
        torch.stack([of_round(messages, r)[c][0].tensors[HELD_EXPERTS] for c in range(4)])
        for r in (1, 2)
    ]
    assert torch.equal(*held) is not moves


def test_homogeneous_clients_hold_equally_many(experiment, federate, messages):
    federate(experiment(method={**METHOD, "homogeneous": True}, **MIXTURE))
    for _, _, request, _ in messages:
        assert set(request.tensors[HELD_EXPERTS].sum(1).tolist()) == {3}


@pytest.mark.slow
def test_who_has_more_rows_may_hold_more_experts(experiment, federate, messages):
    sizes = {"kind": "size", "sizes": [1.0, 1.0, 1.0, 5.0], "client_test_fraction": 0.0}
    sections = {**MIXTURE, "partition": sizes}
    method = {**METHOD, "experts_by": "rows", "max_experts_per_client": 6}
    federate(experiment(method=method, **sections))
    for _, client, request, _ in messages:
        counts = set(request.tensors[HELD_EXPERTS].sum(1).tolist())
        assert counts <= (
            {2} if client < 3 else {6}
        )  # 12 placements, of which 7.5 are the last one's
    with pytest.raises(SettingsError, match="leave one of both out"):
        experiment(method={**METHOD, "experts_by": "rows", "homogeneous": True}, **MIXTURE)


def test_absent_clients_are_assigned_by_what_they_last_sent(experiment, federate, messages):
    some = {**MIXTURE, "federation": {"clients": 4, "rounds": 3, "clients_per_round": 2}}
    found = federate(experiment(method=METHOD, **some))
    there = {client for _, client, _, _ in messages}
    embeddings = by_client(found.state.tensors, EMBEDDING)
    assert embeddings.keys() == there
    last = {client: reply.tensors[TOKENS] for _, client, _, reply in messages}
    for client, tokens in last.items():
        assert torch.equal(embeddings[client], tokens)


def below_zero(shares):
    """Shares that add up to what they did, two of the first layer's (it has two experts at least) moved."""
    moved = shares.clone()
    moved[0], moved[1] = shares[0] + 2, shares[1] - 2
    return moved


def failing(monkeypatch, round, clients, spoil=None):
    plain = SimulationEngine.answer

    def answer(self, exchange, client):
        found = plain(self, exchange, client)
        if (exchange.action, exchange.round) != ("train", round) or client not in clients:
            return found
        if spoil is None:
            return Answer(client, error="the line went dead")
        payload = decode(found.data, exchange.reply_schema)
        spoil(payload.tensors)
        return Answer(client, encode(payload, exchange.reply_schema))

    monkeypatch.setattr(SimulationEngine, "answer", answer)


def test_an_expert_whose_holders_all_fail_keeps_its_value(experiment, federate, monkeypatch):
    one = {**MIXTURE, "federation": {"clients": 4, "rounds": 1}}
    failing(monkeypatch, 1, {0, 1})
    found = federate(experiment(method=METHOD, **one))
    held = by_client(found.state.tensors, ASSIGNMENT)
    lost = held[0].bool() & held[1].bool()
    assert lost.any()
    adapter, initial = part_of(found.state.tensors, ADAPTER), found.parts.initial
    for number, layer in enumerate(found.parts.method.layers):
        for expert in range(6):
            name = f"{layer}.experts.{expert}.B"
            assert torch.equal(adapter[name], initial[name]) == bool(lost[number, expert])


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda t: t[TOKENS].fill_(math.nan), "tensor tokens holds NaN"),
        (lambda t: t[PROJECTED].fill_(math.inf), "tensor projected holds NaN or infinity"),
        (
            lambda t: t.update({PROJECTED: t[PROJECTED][:-1]}),
            "tensor projected has .* rows, this client's experts make",
        ),
        (
            lambda t: t.update({n: x[:-1] for n, x in t.items() if n.startswith("experts ")}),
            "tensor experts .* rows, this client's experts make",
        ),
        (lambda t: t[SHARES].mul_(2), "shares of tokens in layer 0 must be .* add up to 1"),
        (lambda t: t[SHARES].copy_(below_zero(t[SHARES])), "shares of tokens in layer 0 must be"),
    ],
    ids=["tokens", "experts", "few embeddings", "few experts", "shares of 2", "shares below 0"],
)
def test_a_reply_that_does_not_fit_leaves_its_client_out(
    experiment, federate, monkeypatch, spoil, reason
):
    failing(monkeypatch, 2, {2}, spoil)
    found = federate(experiment(method=METHOD, **MIXTURE))
    (told,) = found.records[1].rejected.values()
    assert re.search(reason, told)
    assert all(torch.isfinite(t).all() for t in found.state.tensors.values())
    assert not found.records[2].rejected


def test_a_client_without_rows_for_an_embedding_set(experiment, federate, monkeypatch):
    def single(parts):
        parts.engine.shares[3] = parts.engine.shares[3].take(np.array([0]))

    found = federate(experiment(method=METHOD, **MIXTURE), single)
    assert (
        "client 3 has 1 training row: its embedding set would be empty"
        in (found.records[0].rejected[3])
    )


@pytest.mark.parametrize(
    ("method", "adapter", "clients", "message"),
    [
        ({"clients_per_expert": 5}, {}, 4, "clients_per_expert <= clients: 5 > 4"),
        ({"max_experts_per_client": 1}, {}, 4, "min_experts_per_client <= max_experts_per_client"),
        ({}, {"experts": 1}, 1, "min_experts_per_client <= experts: 2 > 1"),
        ({}, {"experts": 6}, 20, r"min_experts_per_client \* clients <= experts"),
        ({"max_experts_per_client": 2}, {}, 4, r"experts \* clients_per_expert <= max_experts"),
    ],
)
def test_each_budget_that_nobody_can_keep_is_named(experiment, method, adapter, clients, message):
    changed = {
        **MIXTURE,
        "adapter": {**MIXTURE["adapter"], **adapter},
        "federation": {"clients": clients, "rounds": 1},
    }
    with pytest.raises(SettingsError, match=message):
        experiment(method={**METHOD, **method}, **changed)


def test_what_it_does_not_go_with(experiment):
    with pytest.raises(SettingsError, match=r"use adapter\.kind = .experts., not 'lora'"):
        experiment(method=METHOD, **{**MIXTURE, "adapter": {"rank": 2}})
    with pytest.raises(SettingsError, match="may hold other experts in the next round"):
        experiment(method=METHOD, **{**MIXTURE, "training": {"keep_optimizer_state": True}})
    with pytest.raises(SettingsError, match=r"adapter\.top_k is a setting of experts"):
        experiment(**{**MIXTURE, "adapter": {"kind": "lora", "rank": 2, "top_k": 3}})


def test_classes_need_an_adapter_of_another_kind(experiment, federate):
    classes = {
        **MIXTURE,
        "data": {"source": "builtin:labelled", "builtin_rows": 100},
        "objective": {"name": "classification"},
    }
    with pytest.raises(ModelError, match="goes with causal objectives"):
        federate(experiment(method=METHOD, **classes))


def test_newcomers_get_all_experts(experiment):
    more = {**MIXTURE, "federation": {"clients": 5, "rounds": 2}}
    result = fedloom.run(
        experiment(method=METHOD, clients={"newcomers": [4], "newcomer_steps": 2}, **more)
    )
    assert result.metrics


def test_newcomers_hold_no_experts_while_others_train(experiment):
    """Six experts at two clients each are 12 places: three clients of four have them, two have 8."""
    more = {**MIXTURE, "federation": {"clients": 5, "rounds": 1}}
    experiment(method=METHOD, clients={"newcomers": [3, 4], "newcomer_steps": 2}, **more)
    with pytest.raises(SettingsError, match=r"experts \* clients_per_expert <= max_experts"):
        experiment(method=METHOD, clients={"newcomers": [2, 3, 4], "newcomer_steps": 2}, **more)


class Stop(Silent):
    """Presses Ctrl-C after a number of answers."""

    def __init__(self, after):
        self.after = after

    def client_done(self, round, client, done, of):
        self.after -= 1
        if self.after == 0:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_bits_and_its_folders_load(experiment, tmp_path):
    whole = fedloom.run(experiment(method=METHOD, **MIXTURE))
    broken = tmp_path / "broken"
    built = experiment(method=METHOD, **MIXTURE, output={"folder": str(broken)})
    with pytest.raises(Interrupted):
        fedloom.run(built, observer=Stop(7))
    resume_run(broken)
    for client in range(4):
        files = [
            folder / "clients" / f"{client:04d}" / "expert_model.safetensors"
            for folder in (whole.folder, broken)
        ]
        assert files[0].read_bytes() == files[1].read_bytes()
    with pytest.raises(ModelError, match=r"cannot be merged .*: which experts a token passes"):
        export(whole.folder, 1, tmp_path / "out")


def test_one_client_holding_everything_is_shared_by_any_method(experiment, federate):
    """Experts are an adapter as any other: FedAvg averages all of them."""
    plain = {**MIXTURE, "federation": {"clients": 2, "rounds": 2}}
    found = federate(experiment(method={"name": "fedavg"}, **plain), evaluate=True)
    losses = [record.train["loss"] for record in found.records[1:]]
    assert losses[1] < losses[0]
    assert all(record.train["balance"] > 0 for record in found.records[1:])


def test_packing_keeps_ids_and_numbers():
    layers = ("a.q_proj", "a.v_proj", "b.q_proj")
    sizes = {"a.q_proj": (6, 6), "a.v_proj": (6, 3), "b.q_proj": (6, 6)}
    torch.manual_seed(0)
    tensors = {}
    for layer, (inputs, outputs) in sizes.items():
        for part, a, b in (
            ("projection", 2, inputs),
            ("shared.A", 2, inputs),
            ("shared.B", outputs, 2),
        ):
            tensors[f"{layer}.{part}"] = torch.randn(a, b)
        for expert in range(4):
            tensors[f"{layer}.experts.{expert}.A"] = torch.randn(2, inputs)
            tensors[f"{layer}.experts.{expert}.B"] = torch.randn(outputs, 2)
    held = torch.tensor([[1, 0, 0, 1], [0, 1, 1, 0], [1, 1, 1, 0]])
    packed = pack(tensors, layers, held)
    assert {n: len(t) for n, t in packed.items() if n.startswith("experts ")} == {
        "experts 6 3": 2,
        "experts 6 6": 5,
    }
    again = unpack(packed, layers, tensors)
    domain = {n for n in again if is_domain(n)}
    assert domain == {
        f"{layer}.experts.{e}.{factor}"
        for number, layer in enumerate(layers)
        for e in torch.nonzero(held[number])[:, 0].tolist()
        for factor in "AB"
    }
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in again.items())


def test_relevance_and_its_softmax_over_clients_by_hand():
    experts = torch.tensor([[2.0, 0.0, 0.0, 0.0], [0.0, 4.0, 0.0, 0.0]])
    tokens = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
    scores = relevance_of(experts, tokens)
    assert scores.tolist() == [[1.0, 0.0, 1.0], [0.0, 2.0, 2.0]]
    chances = softmax(scores)
    e = math.e
    assert chances[0] == pytest.approx([e / (2 * e + 1), 1 / (2 * e + 1), e / (2 * e + 1)])
    assert chances.sum(1) == pytest.approx([1.0, 1.0])


def test_the_record_says_who_held_what_and_how_tokens_spread(usual):
    found, messages = usual
    for record in found.records[1:]:
        details = record.details["experts"]
        assert details["experts"] == 6 and len(details["layers"]) == len(found.parts.model.layers)
        for client, (request, reply) in of_round(messages, record.round).items():
            held = [torch.nonzero(layer)[:, 0].tolist() for layer in request.tensors[HELD_EXPERTS]]
            assert details["held"][str(client)] == held
            shares = details["shares"][str(client)]
            assert [len(layer) for layer in shares] == [len(layer) for layer in held]
            assert [sum(layer) for layer in shares] == pytest.approx([1.0] * len(held), abs=0.01)
            sent = reply.tensors[SHARES].tolist()
            assert [x for layer in shares for x in layer] == [round(x, 3) for x in sent]
        assert all(x == round(x, 3) for row in details["similarity"] for x in row)
        alike = torch.tensor(details["similarity"])
        assert torch.allclose(alike, alike.T) and torch.allclose(alike.diag(), torch.ones(4))
    json.dumps(found.records[-1].details)


@pytest.mark.parametrize("noise", ["gaussian", "ad_hoc"])
@pytest.mark.slow
def test_noise_is_on_embeddings_alone_and_new_in_every_round(experiment, federate, messages, noise):
    # drawn assignments, so that noise cannot change who holds what
    method = {**METHOD, "assignment": "random"}
    federate(experiment(method=method, **MIXTURE))
    clean = list(messages)
    messages.clear()
    found = federate(experiment(method={**method, "embedding_noise": noise}, **MIXTURE))
    added = []
    for (_, _, _, before), (_, _, _, after) in zip(clean, messages, strict=True):
        assert before.tensors.keys() - after.tensors.keys() == {SHARES}
        for name, tensor in after.tensors.items():
            assert torch.equal(tensor, before.tensors[name]) is (name not in (TOKENS, PROJECTED))
        added.append((after.tensors[TOKENS] - before.tensors[TOKENS]).flatten())
    assert len({tuple(noise.tolist()) for noise in added}) == len(added) == 12
    assert found.records[-1].details["experts"]["shares"] == {}


def test_gaussian_noise_is_as_large_as_is_promised(experiment, federate, messages):
    settings = {"embedding_noise": "gaussian", "epsilon": 2.0, "delta": 1e-3, "embedding_clip": 3.0}
    found = federate(experiment(method={**METHOD, **settings}, **MIXTURE))
    multiplier = noise_multiplier(2.0, 1e-3, releases=3)
    ratios = []
    for _, client, _, reply in messages:
        rows = max(1, round(0.05 * len(found.parts.engine.shares[client])))
        sent = torch.cat([reply.tensors[TOKENS].flatten(), reply.tensors[PROJECTED].flatten()])
        # the mean of cut rows has a norm of at most 3, next to nothing beside this noise
        ratios.append(float(sent.std()) / (multiplier * 2 * 3.0 / rows))
    assert all(0.75 < ratio < 1.25 for ratio in ratios)
    assert (
        "(2, 0.001)-differentially private over the whole run"
        in found.parts.method.privacy_statement()
    )


def test_what_is_learnt_of_an_expert_is_the_mean_over_its_holders():
    """Of two layers and experts the first is held by both clients, the last by one, the others by none."""
    method = FedAMoLE(FedAMoLESettings())
    assignment = {3: torch.tensor([[1, 0], [0, 1]]), 5: torch.tensor([[1, 0], [0, 0]])}
    sent = {3: torch.tensor([[1.0], [8.0]]), 5: torch.tensor([[4.0]])}
    replies = [
        Reply(client, Payload({TOKENS: torch.full((2, 1), client), PROJECTED: own}))
        for client, own in sent.items()
    ]
    before = {3: torch.zeros(2, 1), 7: torch.ones(2, 1)}
    known = ClientRecords(assignment, before, torch.full((2, 2, 1), 9.0))
    found = method._learnt(known, replies, assignment)
    assert found.projected.squeeze(-1).tolist() == [[2.5, 9.0], [9.0, 8.0]]
    assert {client: int(own[0]) for client, own in found.tokens.items()} == {3: 3, 5: 5, 7: 1}
    assert found.assigned is assignment


def fedamole(experts=2, rank=2, **settings):
    """The method with one layer, on a server without a model."""
    method = FedAMoLE(FedAMoLESettings(**settings))
    method.layers, method.experts, method.rank = ("a",), experts, rank
    method.server = SimpleNamespace(seed=0)
    return method


def test_means_are_over_those_who_sent_a_tensor_and_the_others_stay():
    """Clients send twos and fours; one of them holds both experts, the other the first."""
    shapes = {"a.projection": (1, 2), "a.shared.A": (1, 2), "a.shared.B": (3, 1)}
    shapes |= {f"a.experts.{e}.{f}": shapes[f"a.shared.{f}"] for e in (0, 1) for f in "AB"}
    before = {name: torch.zeros(shape) for name, shape in shapes.items()}
    assignment = {3: torch.tensor([[1, 1]]), 5: torch.tensor([[1, 0]])}
    replies = []
    for client, value in ((3, 2.0), (5, 4.0)):
        own = {name: torch.full(shape, value) for name, shape in shapes.items()}
        replies.append(Reply(client, Payload(pack(own, ("a",), assignment[client]))))
    method = fedamole(rank=1)
    found = {n: t.unique().item() for n, t in method._means(before, replies, assignment).items()}
    assert {name for name, value in found.items() if value == 2} == {
        f"a.experts.1.{f}" for f in "AB"
    }
    assert all(value == 3 for name, value in found.items() if ".experts.1." not in name)
    found = method._means(before, replies[1:], assignment)
    assert not found["a.experts.1.A"].any() and found["a.experts.0.A"].unique().item() == 4


ONE_EACH = {"clients_per_expert": 1, "max_experts_per_client": 1, "min_experts_per_client": 1}


def test_experts_go_to_the_clients_whose_tokens_they_project_on():
    """Expert 0 projects on the second client's direction, expert 1 on the first's."""
    tokens = {2: torch.tensor([[9.0, 0.0]]), 4: torch.tensor([[0.0, 9.0]])}
    known = ClientRecords({}, tokens, torch.tensor([[[0.0, 9.0], [9.0, 0.0]]]))
    cohort = Cohort(1, (2, 4), Presence.of({2: 5, 4: 5}), 0.1)
    found = fedamole(**ONE_EACH)._assigned(known, cohort, 1)
    assert {client: own.tolist() for client, own in found.items()} == {2: [[0, 1]], 4: [[1, 0]]}
    turned = dataclasses.replace(known, projected=known.projected.flip(1))
    found = fedamole(**ONE_EACH)._assigned(turned, cohort, 1)
    assert {client: own.tolist() for client, own in found.items()} == {2: [[1, 0]], 4: [[0, 1]]}
    drawn = [
        fedamole(assignment="random", **ONE_EACH)._assigned(own, cohort, 1)[2].tolist()
        for own in (known, turned)
    ]
    assert drawn[0] == drawn[1]


def test_limits_that_one_client_cannot_keep_give_way_with_a_note():
    cohort = Cohort(1, (2,), Presence.of({2: 5}), 0.1)
    assert fedamole()._limits(cohort) == (1, 8, 2)
    assert cohort.notes == {"clients_per_expert": 1.0}


HELD = torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 0]])


@pytest.mark.parametrize(
    ("shares", "layer"),
    [
        ([0.25, 0.75, 1.0], None),
        ([0.0, 1.0, 1.0], None),
        ([0.25, 0.7509, 1.0], None),
        ([0.25, 0.7491, 1.0], None),
        ([0.25, 0.7511, 1.0], 0),
        ([0.25, 0.75, 0.9989], 2),
        ([-0.1, 1.1, 1.0], 0),
    ],
)
def test_shares_of_a_layer_add_up_to_1_within_a_thousandth(shares, layer):
    """A layer of which a client holds no expert has none."""
    words = f"shares of tokens in layer {layer} must be"
    with nullcontext() if layer is None else pytest.raises(MessageError, match=words):
        _check_shares(torch.tensor(shares), HELD)


def test_limits_of_clients_that_hold_equally_many():
    """7 experts of 2 clients each are 14 places, 3.5 for each of 4."""
    assert FedAMoLESettings(homogeneous=True).limits(7, 4) == (2, 4, 3)
    own = FedAMoLESettings(max_experts_per_client=5, min_experts_per_client=1)
    assert own.limits(7, 4) == (2, 5, 1)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, 0),
        ({"embedding_noise": "gaussian", "epsilon": 1.0, "delta": 1e-3, "embedding_clip": 2.0}, 0),
        ({"embedding_noise": "ad_hoc", "eta": 1.0}, 0),
        ({"embedding_noise": "gaussian", "eta": 1.0}, 1),
        ({"embedding_noise": "ad_hoc", "delta": 1e-3, "embedding_clip": 2.0}, 2),
        ({"homogeneous": True}, 0),
        ({"experts_by": "rows"}, 0),
        ({"homogeneous": True, "experts_by": "rows"}, 1),
    ],
)
def test_settings_that_contradict_each_other_are_told_one_by_one(settings, told):
    assert len(FedAMoLESettings(**settings).contradictions(6, 4)) == told


def test_what_is_promised_of_embeddings():
    said = {
        noise: FedAMoLE(FedAMoLESettings(embedding_noise=noise)).privacy_statement()
        for noise in ("none", "ad_hoc", "gaussian")
    }
    assert said["none"] is None and "guarantees nothing" in said["ad_hoc"]
    assert "(8, 1e-05)-differentially private" in said["gaussian"]


@pytest.mark.parametrize(
    ("rows", "settings", "count"),
    [
        (2, {}, 1),
        (50, {}, 2),
        (100, {}, 5),
        (9000, {}, 200),
        (100, {"embedding_fraction": 0.5}, 50),
    ],
)
def test_an_embedding_set_is_a_share_of_the_rows_one_at_least(rows, settings, count):
    """A twentieth: 2.5 of 50 are rounded to an even number; 200 at most."""
    client = SimpleNamespace(id=1, seed=0, share=range(rows))
    method = FedAMoLE(FedAMoLESettings(**settings))
    found = method._embedding_rows(client).tolist()
    assert len(found) == len(set(found)) == count and found == sorted(found)
    assert found == method._embedding_rows(client).tolist() and found[-1] < rows
    client.share = range(1)
    with pytest.raises(DataError, match="client 1 has 1 training row"):
        method._embedding_rows(client)


def test_embeddings_are_means_over_tokens_and_with_noise_over_rows():
    """One layer, two experts, rows of 1 and 3 tokens: sums (4, 0) and (0, 4) of P x, and so on."""
    sums = torch.tensor(
        [[[4.0, 0.0], [1.0, 0.0], [0.0, 0.0]], [[0.0, 4.0], [3.0, 0.0], [0.0, 6.0]]]
    )
    seen = Probed(sums, torch.tensor([1, 3]), [torch.tensor([3.0, 1.0])])
    client = SimpleNamespace(id=1, round=2, rounds=3, noise_seed=0)

    def sent(**settings):
        method = FedAMoLE(FedAMoLESettings(**settings))
        method.layers = ("layer",)
        return method._embeddings(client, seen)

    plain = sent()
    assert plain[TOKENS].tolist() == [[1.0, 1.0]]
    assert plain[PROJECTED].tolist() == [[1.0, 0.0], [0.0, 1.5]]
    assert plain[SHARES].tolist() == [0.75, 0.25]
    means = [([2.0, 2 / 3], 4.0), ([1.0, 0.0], 1.0), ([0.0, 1.0], 2.0)]  # and the longest row's
    rng = generator(0, "embedding noise", 1, 2)
    noisy = [ad_hoc_noise(np.array(own), most, 5.0, rng).tolist() for own, most in means]
    found = sent(embedding_noise="ad_hoc", eta=5.0)
    assert found.keys() == {TOKENS, PROJECTED}
    assert torch.cat([found[TOKENS], found[PROJECTED]]).flatten().tolist() == pytest.approx(
        [x for own in noisy for x in own]
    )


@pytest.mark.parametrize(
    ("adapter", "told"),
    [({}, 0), ({"router": "linear"}, 1)],
)
def test_a_router_of_its_own_is_refused(experiment, adapter, told):
    own = {**MIXTURE, "adapter": {**MIXTURE["adapter"], **adapter}}
    with nullcontext() if not told else pytest.raises(SettingsError, match="routes by the experts"):
        experiment(method=METHOD, **own)


@pytest.mark.slow
def test_noise_is_the_same_when_a_run_is_repeated(experiment, federate):
    noisy = {**METHOD, "embedding_noise": "gaussian"}
    one, two = (federate(experiment(method=noisy, **MIXTURE)) for _ in range(2))
    left, right = (by_client(own.state.tensors, EMBEDDING) for own in (one, two))
    assert left.keys() == right.keys() == set(range(4))
    assert all(torch.equal(left[client], right[client]) for client in left)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"eta": 5.0}, "method.eta is a setting of ad_hoc noise; method.embedding_noise is 'none'"),
        ({"epsilon": 1.0, "embedding_noise": "ad_hoc"}, "method.epsilon is a setting of gaussian"),
    ],
)
def test_settings_of_noise_that_is_not_there(experiment, settings, words):
    with pytest.raises(SettingsError, match=re.escape(words)):
        experiment(method={**METHOD, **settings}, **MIXTURE)


def test_kto_mixes_rows_so_no_row_is_kept_apart(experiment):
    noisy = {**METHOD, "embedding_noise": "gaussian"}
    with pytest.raises(SettingsError, match="completions of other rows"):
        experiment(method=noisy, objective={"name": "kto"}, **MIXTURE)


@pytest.mark.slow
def test_experts_find_the_clients_of_a_domain_that_nobody_told_them_of(experiment, federate):
    own = experiment(
        method={**METHOD, "embedding_fraction": 0.2},
        data={
            "source": "builtin:tastes",
            "builtin_rows": 800,
            "only": {"domain": ["kitchen", "garden", "harbour", "clinic"]},
        },
        partition={"kind": "column", "column": "domain", "client_test_fraction": 0.2},
        federation={"clients": 8, "rounds": 3},
        adapter={"kind": "experts", "rank": 4, "experts": 12},
        training={"learning_rate": 3e-4, "local_steps": 2},
    )
    found = federate(own)
    record = partition_record(own, found.parts.division)
    rounds = [{"round": r.round, "details": r.details} for r in found.records]
    shown = history(rounds, record)
    assert shown.test(1).p > 0.05  # drawn
    chosen = shown.test(3)
    assert chosen.same > 3 * chosen.other
    assert chosen.p == pytest.approx(1 / 105)  # of 105 ways to pair up eight clients, the true one
