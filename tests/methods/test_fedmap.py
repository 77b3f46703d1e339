"""FedMAP by hand: weights by posterior, the prior's precision, the pull on steps, and what clients keep."""

import math
from types import SimpleNamespace

import pytest
import torch

from fedloom.errors import SettingsError
from fedloom.methods.fedmap import (
    ADAPTER,
    FedMAP,
    FedMAPSettings,
    deviations,
    fitted_precision,
    omegas,
)
from fedloom.tensors import join_parts
from fedloom.wire.messages import Payload, Reply

THREE = {0: 1, 1: 3, 2: 4}


def replies(*numbers):
    return [
        Reply(client, Payload({}, {"log_likelihood": own, "examples": rows}))
        for client, (own, rows) in enumerate(numbers)
    ]


def test_weights_by_likelihood_and_prior():
    # R = 0.0106 for all, n = 10: omega = exp(-0.70106), exp(-0.20106), of which the ratio is exp(0.5)
    squares, precision = [{"w": 0.0212}] * 3, {"w": 1.0}
    found = omegas(replies((-0.7, 10), (-0.2, 10), (-0.7, 10)), squares, precision)
    assert found == pytest.approx([0.27406862, 0.45186276, 0.27406862])
    # a client whose R / n is larger weighs less: R = 1 of 2 rows and of 10 rows
    found = omegas(replies((-0.5, 2), (-0.5, 10), (-0.5, 10)), [{"w": 2.0}] * 3, precision)
    assert found[0] / found[1] == pytest.approx(math.exp(-0.5 + 0.1))


def test_equal_likelihoods_are_the_plain_mean_whatever_the_rows():
    assert omegas(replies((-0.5, 1), (-0.5, 99)), [{"w": 0.0}] * 2, {"w": 1.0}) == [0.5, 0.5]


@pytest.mark.parametrize(
    ("count", "most"), [(1, 1.0), (2, 0.5), (3, 0.5), (5, 0.5), (10, 0.5), (20, 0.25)]
)
def test_no_claim_takes_more_than_five_times_its_part_or_a_half(count, most):
    claims = replies((1e6, 1), *[(-0.5, 1)] * (count - 1))
    own = omegas(claims, [{"w": 0.0}] * count, {"w": 1.0})
    assert own == pytest.approx([most, *[(1 - most) / max(count - 1, 1)] * (count - 1)])


def test_the_precision_is_that_of_the_deviations():
    # two numbers, weighted squared deviation 0.5: lambda = 4
    mean = {"w": torch.tensor([1.0, 1.0])}
    answers = [{"w": torch.tensor([1.5, 1.5])}, {"w": torch.tensor([1.0, 1.0 - 0.5**0.5])}]
    assert [deviations(own, mean)["w"] for own in answers] == pytest.approx([0.5, 0.5])
    assert fitted_precision(answers, [0.3, 0.7], mean)["w"] == pytest.approx(4)
    assert fitted_precision([mean], [1.0], mean)["w"] == math.inf


def test_steps_are_pulled_by_the_precision_over_the_rows(play):
    # client 1: target (3, 2), 3 rows, lambda 6: w <- w - 0.1 (w - target + 2 (w - mu)), mu = (0, 1)
    method = FedMAP(FedMAPSettings(precision=6.0))
    found = play(method, rounds=1, cohort=(1,))
    w = [0.0, 1.0]
    for _ in range(2):
        w = [
            v - 0.1 * (v - target + 6 / 3 * (v - mu))
            for v, target, mu in zip(w, (3.0, 2.0), (0.0, 1.0), strict=True)
        ]
    assert found.adapters[0] == pytest.approx(w)
    assert found.kept[1][ADAPTER]["lora_w"].tolist() == pytest.approx(w)
    moved = sum((own - mu) ** 2 for own, mu in zip(w, (0.0, 1.0), strict=True))
    assert float(found.states[0].tensors["precision/lora_w"]) == pytest.approx(2 / moved)


def test_a_weak_prior_is_local_training_and_a_client_that_is_away_keeps_its_adapter(play):
    weak = FedMAPSettings(precision=1e-9, least_precision=1e-12, most_precision=1e-9)
    found = play(FedMAP(weak), cohort=(0, 1, 2), rows=THREE, absent={2: (1,)})
    local = [0.0 + 0.1 * 3 + 0.1 * (3 - 0.3), 1.0 + 0.1 * 1 + 0.1 * (1 - 0.1)]
    again = play(FedMAP(weak), rounds=1, cohort=(0, 1, 2), rows=THREE)
    assert again.kept[1][ADAPTER]["lora_w"].tolist() == pytest.approx(local)
    away = play(FedMAP(weak), rounds=2, cohort=(0, 1, 2), rows=THREE, absent={2: (1,)})
    assert torch.equal(away.kept[1][ADAPTER]["lora_w"], again.kept[1][ADAPTER]["lora_w"])
    assert len(found.states) == 3


def test_precisions_stay_between_their_bounds(play):
    method = FedMAP(FedMAPSettings(precision=1.0, least_precision=0.9, most_precision=1.1))
    for state in play(method, cohort=(0, 1, 2), rows=THREE).states:
        assert 0.9 <= float(state.tensors["precision/lora_w"]) <= 1.1 + 1e-6


def test_bounds_out_of_order_are_refused(experiment):
    with pytest.raises(SettingsError, match=r"method\.precision = 5 is not between"):
        experiment(method={"name": "fedmap", "precision": 5.0, "most_precision": 2.0})


def test_a_client_is_judged_by_its_own_adapter():
    method = FedMAP(FedMAPSettings())
    own, sent = {"w": torch.ones(1)}, {"w": torch.zeros(1)}
    seen = []
    model = SimpleNamespace(write=seen.append)
    client = SimpleNamespace(store={ADAPTER: own}, own_start=False, model=model)
    method.load(client, Payload(sent))
    client.store = {}
    method.load(client, Payload(sent))
    assert seen == [own, sent]


def test_a_client_tells_minus_its_loss():
    def steps(rate, before_step):
        yield from ()
        return SimpleNamespace(metrics={})

    weight = torch.zeros(1)
    model = SimpleNamespace(
        device=weight.device, write=lambda tensors: None, read=lambda: {"w": weight}
    )
    client = SimpleNamespace(
        model=model, share=[0, 0], store={}, loss=lambda batches: 0.25, training_steps=steps
    )
    sent = join_parts(adapter={"w": weight}, precision={"w": torch.tensor(4.0)})
    told = FedMAP(FedMAPSettings())._train(client, Payload(sent, {"learning_rate": 0.1}))
    with pytest.raises(StopIteration) as stop:
        next(told)
    assert stop.value.value.numbers == {"examples": 2, "log_likelihood": -0.25}
