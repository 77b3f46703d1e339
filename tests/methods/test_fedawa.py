"""FedAWA in rounds of two clients: FedAvg without steps, weights by client, and who is away."""

import math

import pytest

from fedloom.methods.fedavg import FedAvg, FedAvgSettings
from fedloom.methods.fedawa import FedAWA, FedAWASettings

THREE = {0: 1, 1: 3, 2: 4}


def test_without_steps_it_is_fedavg(play):
    found = play(FedAWA(FedAWASettings(steps=0)), cohort=(0, 1, 2), rows=THREE)
    plain = play(FedAvg(FedAvgSettings()), cohort=(0, 1, 2), rows=THREE)
    for own, other in zip(found.adapters, plain.adapters, strict=True):
        assert own == pytest.approx(other, abs=1e-12)


def test_published_it_begins_at_nearly_equal_weights(play):
    # shares 0.25 and 0.75, of which a softmax makes 0.378 and 0.622
    method = FedAWA(FedAWASettings(steps=0, start="shares"))
    state = play(method, rounds=1).states[0]
    assert state.numbers == {"logit/000000": 0.25, "logit/000001": 0.75}


def test_a_client_that_disagrees_weighs_less(play):
    # targets (1, -1), (3, 2), (-2, 0.5), all with the same rows
    method = FedAWA(FedAWASettings(steps=10, learning_rate=0.05, most=3))
    rows = {0: 2, 1: 2, 2: 2}
    state = play(method, rounds=2, cohort=(0, 1, 2), rows=rows).states[-1]
    logits = [state.numbers[f"logit/{client:06d}"] for client in rows]
    assert logits[2] < logits[0] and sum(logits) == pytest.approx(3 * math.log(2))


def test_a_client_that_is_away_keeps_its_logit_and_gives_it_to_nobody(play):
    method = FedAWA(FedAWASettings())
    found = play(method, cohort=(0, 1, 2), rows=THREE, absent={1: (1,), 2: (0,)})
    first, second, third = (state.numbers for state in found.states)
    assert first.keys() == {"logit/000000", "logit/000002"}
    assert second["logit/000000"] == first["logit/000000"]
    assert second["logit/000002"] != first["logit/000002"]
    assert third.keys() == {f"logit/{client:06d}" for client in THREE}


def test_no_client_takes_it_all(play):
    # ever larger steps towards one client: no share is above 1.2 times a third
    method = FedAWA(FedAWASettings(steps=50, learning_rate=1.0, most=1.2))
    rows = {0: 2, 1: 2, 2: 2}
    state = play(method, rounds=3, cohort=(0, 1, 2), rows=rows).states[-1]
    logits = [state.numbers[f"logit/{client:06d}"] for client in rows]
    shares = [math.exp(own) / sum(map(math.exp, logits)) for own in logits]
    assert max(shares) == pytest.approx(0.4) and sum(logits) == pytest.approx(3 * math.log(2))
