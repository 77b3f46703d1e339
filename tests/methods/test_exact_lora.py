"""FLoRA, FedEx-LoRA and FFA-LoRA keep the mean of products exactly; averaging does not. Mixed ranks.

What clients sent is read off the encoded answers of real rounds.
"""

import math

import pytest
import torch

from fedloom.aggregation.lora import averaging_error, only_factors, rank_of
from fedloom.engines.in_process import SimulationEngine
from fedloom.errors import SettingsError
from fedloom.methods.bases.backbone_additions import (
    ADDITIONS,
    BASE,
    _additions,
    _bytes_lacking,
    _out_of_date,
    _still_wanted,
)
from fedloom.methods.bases.packed_factors import FACTORS, pack, unpack
from fedloom.models.backbone_delta import MOVED, products
from fedloom.tensors import State
from fedloom.wire.messages import Answer, decode, encode

PAIRS = {
    "data": {"source": "builtin:opposed", "builtin_rows": 60},
    "partition": {"kind": "size", "sizes": [1.0, 2.0, 3.0]},
    "federation": {"clients": 3, "rounds": 2},
    "adapter": {"rank": 4, "alpha": 8.0},
    "training": {"learning_rate": 1e-2},
}
CLASSES = {
    **PAIRS,
    "data": {"source": "builtin:labelled", "builtin_rows": 90},
    "objective": {"name": "classification"},
}
GROUPS = {"groups": {"small": {"clients": [0], "rank": 1}, "middle": {"clients": [2], "rank": 3}}}


@pytest.fixture
def answers(monkeypatch):
    """Every answer of every exchange, decoded, as (action, round, client, payload)."""
    seen = []
    plain = SimulationEngine.exchange

    def exchange(self, exchange):
        for answer in plain(self, exchange):
            assert answer.error is None, answer.error
            payload = decode(answer.data, exchange.reply_schema)
            seen.append((exchange.action, exchange.round, answer.client, payload))
            yield answer

    monkeypatch.setattr(SimulationEngine, "exchange", exchange)
    return seen


def trained(answers, round):
    return {c: p for action, r, c, p in answers if action == "train" and r == round}


def ranks_of(payloads):
    return {client: len(payload.tensors[FACTORS]) for client, payload in payloads.items()}


def mean_of_products(payloads, scaling, packed_like=None):
    """Return sum_k p_k s B_k A_k in float64 by layer."""
    rows = sum(p.numbers["examples"] for p in payloads.values())
    total = {}
    for payload in payloads.values():
        factors = unpack(payload.tensors, packed_like) if packed_like else payload.tensors
        share = payload.numbers["examples"] / rows
        doubles = {n: t.double() for n, t in factors.items()}
        for name, down in doubles.items():
            if ".lora_A." in name:
                up = doubles[name.replace(".lora_A.", ".lora_B.")]
                layer = MOVED + name.partition(".lora_A.")[0]
                total[layer] = total.get(layer, 0) + share * scaling * up @ down
    return total


def distance(found, exact):
    return max(float((found[n].double() - exact[n]).abs().max()) for n in exact)


@pytest.mark.parametrize("task", [PAIRS, CLASSES], ids=["pairs", "classes"])
def test_flora_adds_the_mean_of_products_of_every_round(experiment, federate, answers, task):
    found = federate(experiment(method={"name": "flora"}, clients=GROUPS, **task))
    rounds = [trained(answers, round) for round in (1, 2)]
    ranks = ranks_of(rounds[0])
    assert ranks == {0: 1, 1: 4, 2: 3}
    exact = [mean_of_products(payloads, 2.0, found.parts.initial) for payloads in rounds]
    whole = {name: exact[0][name] + exact[1][name] for name in exact[0]}
    assert max(float(t.abs().max()) for t in exact[0].values()) > 1e-4
    base = {n: t for n, t in found.adapter.items() if n.startswith(MOVED)}
    assert distance(base, whole) < 1e-6
    for client in ranks:  # every client has made the same additions
        kept = found.parts.engine.store.slots(client)[BASE]
        assert int(kept[ADDITIONS]) == 2
        assert all(torch.equal(kept[name], base[name]) for name in base)
    factors = [unpack(payloads[1].tensors, found.parts.initial) for payloads in rounds]
    for name in factors[0]:
        if ".lora_A." in name:  # fresh in every round
            assert not torch.allclose(factors[0][name], factors[1][name], atol=0.05)


@pytest.mark.parametrize("task", [PAIRS, CLASSES], ids=["pairs", "classes"])
def test_fedex_and_its_backbone_are_the_mean_of_products(experiment, federate, answers, task):
    found = federate(experiment(method={"name": "fedex_lora"}, **task))
    exact = mean_of_products(trained(answers, 2), 2.0)
    # The adapter is the mean of round 2; the backbone holds both rounds' residuals.
    first = mean_of_products(trained(answers, 1), 2.0)
    plain = {}
    for round, whole in ((1, first), (2, exact)):
        payloads = trained(answers, round)
        rows = sum(p.numbers["examples"] for p in payloads.values())
        mean = {
            name: sum(
                p.numbers["examples"] / rows * p.tensors[name].double() for p in payloads.values()
            )
            for name in only_factors(payloads[0].tensors)
        }
        averaged = {n: t.double() for n, t in products_double(mean, 2.0).items()}
        assert distance(averaged, whole) > 1e-6  # averaging is not the mean of products
        for name in whole:
            plain[name] = plain.get(name, 0) + whole[name] - averaged[name]
    base = {n: t for n, t in found.adapter.items() if n.startswith(MOVED)}
    assert distance(base, plain) < 1e-6
    together = {n: t.double() + base[n].double() for n, t in products(found.adapter, 2.0).items()}
    held = {n: exact[n] + plain[n] - residual for n, residual in last_residual(answers).items()}
    assert distance(together, held) < 1e-6
    assert all(r.train["aggregation_error"] > 0 for r in found.records)


def products_double(factors, scaling):
    return {
        MOVED + n.partition(".lora_A.")[0]: scaling
        * factors[n.replace(".lora_A.", ".lora_B.")]
        @ down
        for n, down in factors.items()
        if ".lora_A." in n
    }


def last_residual(answers):
    payloads = trained(answers, 2)
    rows = sum(p.numbers["examples"] for p in payloads.values())
    mean = {
        name: sum(
            p.numbers["examples"] / rows * p.tensors[name].double() for p in payloads.values()
        )
        for name in only_factors(payloads[0].tensors)
    }
    exact = mean_of_products(payloads, 2.0)
    return {n: exact[n] - t for n, t in products_double(mean, 2.0).items()}


def test_ffa_is_exact_and_fedavg_is_not(experiment, federate, answers):
    found = federate(experiment(method={"name": "ffa_lora"}, **PAIRS))
    initial = found.parts.initial
    whole = [
        {**{n: t for n, t in initial.items() if ".lora_A." in n}, **p.tensors}
        for p in trained(answers, 2).values()
    ]
    rows = [p.numbers["examples"] for p in trained(answers, 2).values()]
    assert averaging_error(whole, rows) == pytest.approx(0.0, abs=1e-7)
    answers.clear()
    plain = federate(experiment(method={"name": "fedavg"}, **PAIRS))
    assert plain.records[-1].train["aggregation_error"] > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("method", ["flexlora", "hetlora"])
def test_clients_of_any_rank_share_one_adapter(experiment, federate, answers, method):
    # rows that prefer either side: the first rounds only sway, the sixth is below the first
    longer = {**PAIRS, "federation": {"clients": 3, "rounds": 6}}
    found = federate(experiment(method={"name": method}, clients=GROUPS, **longer), evaluate=True)
    assert ranks_of(trained(answers, 2)) == {0: 1, 1: 4, 2: 3} and rank_of(found.adapter) == 4
    assert not found.records[-1].rejected
    losses = [r.train["loss"] for r in found.records[1:]]
    assert losses[-1] < losses[0]
    if method == "flexlora":  # largest first, so that a part is the best of its size
        for name, down in found.adapter.items():
            if ".lora_A." in name:
                sizes = down.norm(dim=1)
                assert all(sizes[i] >= sizes[i + 1] - 1e-6 for i in range(3))
    sent = {c: [x.bytes_up for x in found.costs(c) if x.phase == "train"] for c in (0, 1)}
    assert sent[0][0] < 0.5 * sent[1][0]


def test_with_one_rank_hetlora_is_fedavg_but_for_the_weights(experiment, federate, answers):
    found = federate(experiment(method={"name": "hetlora"}, **PAIRS))
    assert set(ranks_of(trained(answers, 1)).values()) == {4}
    assert found.records[-1].train["aggregation_error"] > 0


def test_a_client_that_missed_an_addition_is_left_out_and_brought_up_to_date(
    experiment, federate, monkeypatch
):
    """Client 2's addition of round 1 is lost; in round 2 it gets the whole first, and all agree again."""
    plain = SimulationEngine.answer
    actions = []

    def answer(self, exchange, client):
        if exchange.round > 0:
            actions.append((exchange.round, exchange.action, client))
        if (exchange.round, exchange.action, client) == (1, "merge", 2):
            return Answer(client, error="the line went dead")
        return plain(self, exchange, client)

    monkeypatch.setattr(SimulationEngine, "answer", answer)
    found = federate(experiment(method={"name": "flora"}, **PAIRS), evaluate=True)
    assert found.records[1].rejected == {2: "the line went dead"}
    assert 2 not in found.records[1].evaluation.clients  # its model would be another
    assert (2, "catch_up", 2) in actions and (2, "catch_up", 1) not in actions
    assert not found.records[2].rejected and 2 in found.records[2].evaluation.clients
    base = [found.parts.engine.store.slots(c)[BASE] for c in range(3)]
    assert all(torch.equal(base[0][n], own[n]) for own in base for n in base[0])


def test_a_client_whose_store_is_gone_says_so_and_is_brought_up_to_date(experiment, federate):
    longer = {**PAIRS, "federation": {"clients": 3, "rounds": 3}}

    def forget(parts):
        plain = parts.engine.exchange

        def exchange(exchange):
            if (exchange.round, exchange.action) == (2, "train"):
                parts.engine.store.stage(1, {})
            return plain(exchange)

        parts.engine.exchange = exchange

    found = federate(experiment(method={"name": "fedex_lora"}, **longer), forget)
    assert "its backbone has the additions of 0 of 1 rounds" in found.records[1].rejected[1]
    assert not found.records[2].rejected


@pytest.mark.parametrize("rows", [0, 2])
def test_factors_of_another_rank_than_the_clients_are_refused(
    experiment, federate, monkeypatch, rows
):
    plain = SimulationEngine.answer

    def answer(self, exchange, client):
        found = plain(self, exchange, client)
        if exchange.action != "train" or client != 1:
            return found
        payload = decode(found.data, exchange.reply_schema)
        payload.tensors[FACTORS] = payload.tensors[FACTORS][:rows]
        return Answer(client, encode(payload, exchange.reply_schema))

    monkeypatch.setattr(SimulationEngine, "answer", answer)
    for method in ("flora", "flexlora"):
        found = federate(experiment(method={"name": method}, **PAIRS))
        assert f"its factors have rank {rows}, this client's is 4" in found.records[0].rejected[1]


def test_what_cannot_be_meant(experiment):
    with pytest.raises(SettingsError, match=r"rank = 16 is above adapter\.rank = 4"):
        experiment(
            method={"name": "flora"},
            **{**PAIRS, "clients": {"groups": {"a": {"clients": [0], "rank": 16}}}},
        )
    with pytest.raises(SettingsError, match="allows other ranks of one model"):
        experiment(
            method={"name": "hetlora"},
            **{**PAIRS, "clients": {"groups": {"a": {"clients": [0], "model": "x"}}}},
        )
    with pytest.raises(SettingsError, match="which a quantised one cannot take up"):
        experiment(method={"name": "fedex_lora"}, model={"quantization": "int8"}, **PAIRS)
    with pytest.raises(SettingsError, match="begins every round with fresh factors"):
        experiment(
            method={"name": "flora"}, **{**PAIRS, "training": {"keep_optimizer_state": True}}
        )
    with pytest.raises(SettingsError, match="all clients need the same model and rank"):
        experiment(method={"name": "fedavg"}, clients=GROUPS, **PAIRS)
    with pytest.raises(SettingsError, match=r'use adapter\.kind = "lora"'):
        experiment(method={"name": "flora"}, **{**PAIRS, "adapter": {"kind": "ia3", "rank": 8}})


def test_packing_keeps_every_number_and_one_buffer(experiment, federate):
    found = federate(experiment(method={"name": "fedavg"}, **CLASSES))
    adapter = found.adapter
    packed = pack(adapter)
    assert packed[FACTORS].shape[0] == 4 and len(packed) == 1 + len(adapter) - len(
        only_factors(adapter)
    )
    again = unpack(packed, adapter)
    assert list(again) == list(adapter)
    assert all(torch.equal(tensor, adapter[name]) for name, tensor in again.items())


def test_what_clients_lack_is_kept_while_it_is_smaller_than_the_sum():
    """Additions 1 to 4 of 8, 8, 8 and 16 bytes, and a sum of 32."""
    own = {n: {"w": torch.zeros(2 if n < 4 else 4)} for n in (1, 2, 3, 4)}
    assert [_bytes_lacking(own, made, 4) for made in (0, 1, 3, 4)] == [40, 32, 16, 0]
    assert _bytes_lacking({4: own[4]}, 2, 4) == math.inf
    assert _bytes_lacking(own, 1, 3) == 16
    kept = [_still_wanted(own, {7: made}, 32) for made in (0, 1, 2, 3)]
    assert [sorted(one) for one in kept] == [[], [], [3, 4], [4]]
    assert sorted(_still_wanted(own, {7: 3, 8: 2, 9: 0}, 32)) == [3, 4]
    assert _still_wanted(own, {}, 32) == {}


def test_what_the_state_says_of_clients_and_additions():
    """A client of an earlier release's checkpoint is out of date, its number unknown."""
    state = State(
        {"addition/000012/w": torch.ones(1), "addition/000002/w": torch.zeros(1), "base/w": torch.zeros(1)},
        {"merges": 3.0, "made/000004": 2.0, "behind 000005": 1.0},
    )  # fmt: skip
    assert _out_of_date(state) == {5: 0, 4: 2}
    assert list(_additions(state)) == [2, 12] and _additions(state)[12]["w"].item() == 1
