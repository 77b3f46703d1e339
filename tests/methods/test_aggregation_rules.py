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


@pytest.mark.parametrize(
    ("sections", "words"),
    [
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
