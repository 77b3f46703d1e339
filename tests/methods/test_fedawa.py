"""FedAWA in rounds of two clients: FedAvg without steps, weights by client, and who is away."""

import math

import pytest
import torch

import linear_bench
from fedloom.federation.presence import Presence
from fedloom.federation.protocol import Cohort, Replies
from fedloom.methods.fedavg import FedAvg, FedAvgSettings
from fedloom.methods.fedawa import FedAWA, FedAWASettings, _of_shares
from fedloom.tensors import State
from fedloom.wire.messages import Payload, Reply

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


def test_shares_are_of_all_rows_whoever_answers(play):
    # 1 and 4 of 8 rows where client 1, with 3, is away; then it comes with its own
    method = FedAWA(FedAWASettings(steps=0, start="shares"))
    found = play(method, rounds=2, cohort=(0, 1, 2), rows=THREE, absent={1: (1,)}).states
    assert found[0].numbers == {"logit/000000": 0.125, "logit/000002": 0.5}
    assert found[1].numbers == {**found[0].numbers, "logit/000001": 0.375}


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


def distances(name, turned=None, **settings):
    """Mean squared relative error over three seeds of six clients around a truth, and the last weights."""
    found, weights = [], []
    for seed in range(3):
        truth = linear_bench.target_of(2, seed)
        rng = torch.Generator().manual_seed(seed)
        apart = torch.randn(6, *truth.shape, generator=rng) / 4
        played = linear_bench.play(
            name, rounds=30, steps=5, target={k: truth + own for k, own in enumerate(apart)},
            rows=dict.fromkeys(range(6), 2), settings=settings, seed=seed,
            turned=lambda k, own, rng=rng: {n: torch.randn(t.shape, generator=rng) for n, t in own.items()}
            if k == turned else own,
        )  # fmt: skip
        found.append(linear_bench.error(played, truth))
        weights.append(played.cohorts[-1].details.get("weights", {}))
    return sum(found) / 3, weights


@pytest.mark.slow
def test_what_the_weights_cost_and_bring_in_a_linear_example():
    """docs/merging.md has these numbers: FedAvg, FedAWA, FedAWA without a bound, and one client of noise."""
    got = [distances("fedavg"), distances("fedawa"), distances("fedawa", most=100.0)]
    got += [distances("fedavg", 0), distances("fedawa", 0)]
    assert [own for own, _ in got] == pytest.approx([0.078, 0.093, 0.479, 0.353, 0.104], rel=0.05)
    assert all(max(own.values()) > 0.7 for own in got[2][1])


def test_no_client_takes_it_all(play):
    # ever larger steps towards one client: no share is above 1.2 times a third
    method = FedAWA(FedAWASettings(steps=50, learning_rate=1.0, most=1.2))
    rows = {0: 2, 1: 2, 2: 2}
    state = play(method, rounds=3, cohort=(0, 1, 2), rows=rows).states[-1]
    logits = [state.numbers[f"logit/{client:06d}"] for client in rows]
    shares = [math.exp(own) / sum(map(math.exp, logits)) for own in logits]
    assert max(shares) == pytest.approx(0.4) and sum(logits) == pytest.approx(3 * math.log(2))


def test_weights_and_their_entropy_are_told():
    """Without steps of 1 and 3 rows: -(0.25 ln 0.25 + 0.75 ln 0.75) = 0.56233514."""
    method = FedAWA(FedAWASettings(steps=0))
    cohort = Cohort(1, (0, 1), Presence.of({0: 1, 1: 3}), 0.1)
    playing = method.round(State({"w": torch.zeros(1)}), cohort)
    next(playing)
    answers = [
        Reply(k, Payload({"w": torch.ones(1)}, {"examples": n})) for k, n in ((0, 1), (1, 3))
    ]
    with pytest.raises(StopIteration):
        playing.send(Replies(answers))
    assert cohort.details["weights"] == pytest.approx({"0": 0.25, "1": 0.75})
    assert cohort.notes["weight_entropy"] == pytest.approx(0.56233514)


def test_a_share_of_nothing_is_kept_as_a_millionth():
    """ln 1e-6 = -13.8155, and the mean of the logits stays 2."""
    own = _of_shares([1.0, 0.0], [4.0, 0.0])
    assert own[0] - own[1] == pytest.approx(13.815511) and sum(own) == pytest.approx(4)
    assert _of_shares([0.5, 0.5], [4.0, 4.0]) == [4.0, 4.0]
