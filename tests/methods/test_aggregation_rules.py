"""Robust rules as a setting: every method that averages, attackers in real rounds, refusals."""

import math

import pytest
import torch

from fedloom.engines.in_process import SimulationEngine
from fedloom.errors import RoundFailed, SettingsError
from fedloom.methods import METHODS
from fedloom.wire.messages import Answer, decode, encode
from sampling import every

RULES = {
    "median": {},
    "trimmed_mean": {"bad": 1},
    "krum": {"bad": 1},
    "multi_krum": {"bad": 1},
    "geometric_median": {},
    "clipped_mean": {"max_norm": 0.5},
}

AVERAGING = sorted(name for name, (_, kind) in METHODS.items() if kind.averages)


@pytest.fixture
def attacked(monkeypatch):
    """Client 0 multiplies what it sends by -1000."""
    plain = SimulationEngine.answer

    def answer(self, exchange, client):
        found = plain(self, exchange, client)
        if exchange.action != "train" or client:
            return found
        payload = decode(found.data, exchange.reply_schema)
        for name, tensor in payload.tensors.items():
            payload.tensors[name] = -1000 * tensor
        return Answer(client, encode(payload, exchange.reply_schema))

    def switch():
        monkeypatch.setattr(SimulationEngine, "answer", answer)

    return switch


MERGING = {
    "task_arithmetic": {"scale": 2.0},
    "ties": {"density": 0.3},
    "dare": {"density": 0.5},
    "knots": {"density": 0.5},
}


def settings(rule):
    return {"aggregation": {"rule": rule, **RULES.get(rule, {})}}


FIVE = {"federation": {"clients": 5, "rounds": 1}, "data": {"builtin_rows": 100}}


def norm(found, other):
    return math.sqrt(sum(float((t - other[name]).square().sum()) for name, t in found.items()))


@pytest.mark.parametrize("rule", RULES)
def test_one_attacker_of_five_moves_the_mean_far_and_no_robust_rule(
    experiment, federate, attacked, once, rule
):
    honest = once("honest", lambda: federate(experiment(**FIVE)).adapter)
    attacked()
    mean = once("attacked", lambda: federate(experiment(**FIVE)))
    robust = federate(experiment(**FIVE, **settings(rule)))
    start = mean.parts.initial
    moved = norm(honest, start)
    assert norm(mean.adapter, honest) > 100 * moved
    bound = 0.5 if rule == "clipped_mean" else 1.5 * moved
    assert norm(robust.adapter, honest) < bound


@pytest.mark.parametrize("name", every(3, AVERAGING))
def test_every_method_that_averages_knows_the_rules(experiment, federate, name):
    own = {"method": {"name": name}, "federation": {"clients": 3, "rounds": 1}}
    own |= {"data": {"builtin_rows": 30}, "training": {"batch_size": 4}}
    plain = federate(experiment(**own)).state.tensors
    robust = federate(experiment(**own, **settings("median"))).state.tensors
    assert plain.keys() == robust.keys()
    assert any(not torch.equal(plain[key], robust[key]) for key in plain)


@pytest.mark.parametrize("rule", MERGING)
def test_rules_of_model_merging_in_rounds(experiment, federate, once, rule):
    own = {"federation": {"clients": 3, "rounds": 2}, "data": {"builtin_rows": 30}}
    plain = once("plain", lambda: federate(experiment(**own)).adapter)
    rules = {"aggregation": {"rule": rule, **MERGING[rule]}}
    found = federate(experiment(**own, **rules))
    again = federate(experiment(**own, **rules))
    assert found.state.digest() == again.state.digest()
    assert any(not torch.equal(found.adapter[name], plain[name]) for name in plain)
    assert all(torch.isfinite(tensor).all() for tensor in found.adapter.values())


def test_the_mean_of_products_is_cut_to_the_rank_with_a_note(experiment, federate):
    own = {"federation": {"clients": 3, "rounds": 1}, "data": {"builtin_rows": 30}}
    own |= {"training": {"local_steps": 4, "batch_size": 4, "learning_rate": 0.01}}
    rules = {"aggregation": {"rule": "task_arithmetic", "space": "product"}}
    found = federate(experiment(**own, **rules))
    plain = federate(experiment(**own))
    lost = found.records[-1].train["rank_error"]
    assert 0 <= lost < plain.records[-1].train["aggregation_error"]  # no pair of rank 2 is nearer
    assert found.adapter.keys() == plain.adapter.keys()


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        (
            {"aggregation": {"rule": "knots"}, "method": {"name": "ffa_lora"}},
            "makes other factors, which method.name = 'ffa_lora' does not go on with; use fedavg, fedprox",
        ),
        (
            {"aggregation": {"rule": "ties", "space": "product"}, "adapter": {"kind": "full"}},
            "of products needs adapter.kind = \"lora\", not 'full'",
        ),
        ({"aggregation": {"rule": "ties", "density": 0.0}}, "aggregation.density"),
        ({"aggregation": {"rule": "ties", "scale": -1.0}}, "aggregation.scale"),
        (
            {"aggregation": {"bad": 1}},
            "aggregation.bad is a setting of trimmed_mean, krum, multi_krum",
        ),
        ({"aggregation": {"rule": "clipped_mean"}}, "go together"),
        ({"aggregation": {"max_norm": 1.0}}, "go together"),
        (
            {"aggregation": {"rule": "krum", "bad": 1}},
            "needs 5 clients in a round, there are 3",
        ),
        (
            {"aggregation": {"rule": "median"}, "method": {"name": "scaffold"}},
            "'scaffold' puts updates together in a way of its own",
        ),
        ({"aggregation": {"rule": "meen"}}, "rule"),
    ],
)
def test_rules_that_cannot_be_kept(experiment, sections, words):
    with pytest.raises(SettingsError, match=words):
        experiment(**sections)


def test_too_few_answers_for_the_rule_stop_the_run(experiment, federate, monkeypatch):
    plain = SimulationEngine.answer

    def answer(self, exchange, client):
        if exchange.action == "train" and client == 4:
            return Answer(client, error="the line went dead")
        return plain(self, exchange, client)

    monkeypatch.setattr(SimulationEngine, "answer", answer)
    with pytest.raises(RoundFailed, match="'krum' has too few updates: 4 of 4 updates are finite"):
        federate(experiment(**FIVE, **settings("krum")))
