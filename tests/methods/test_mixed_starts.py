"""APFL and FedALA by hand: mixtures of a client's own adapter and the shared one."""

from types import SimpleNamespace

import pytest
import torch

from fedloom.methods import METHODS
from fedloom.methods.apfl import APFL, MIXING, Alternating, APFLSettings, mixture
from fedloom.methods.bases.parameter_averaging import ADAPTER
from fedloom.methods.bases.personal_parts import PERSONAL
from fedloom.methods.fedala import (
    SHARED,
    WEIGHTS,
    FedALA,
    FedALASettings,
    PlainSteps,
    Start,
)
from fedloom.methods.fedavg import FedAvg, FedAvgSettings
from fedloom.training.optimizers import make_optimizer
from fedloom.training.settings import Part, TrainingSettings, Work
from fedloom.training.steps import update
from fedloom.wire.messages import Payload

CPU = torch.device("cpu")
TARGETS = {0: (1.0, -1.0), 1: (3.0, 2.0)}
SGD = TrainingSettings(optimizer="sgd", max_grad_norm=0.0)


def one(value):
    return {"w": torch.tensor([value], dtype=torch.float64)}


def step(coordinates, target, rate):
    """Make a step on (x - target)^2 / 2, with x what the coordinates stand for."""
    model = {"w": torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))}
    coordinates.write(model)
    model["w"].grad = model["w"].detach() - target
    coordinates.pull_back(model)
    update(coordinates.parameters, make_optimizer(coordinates.parameters, SGD, rate), SGD)
    coordinates.write(model)
    return float(model["w"].detach())


@pytest.mark.parametrize(("target", "share", "own"), [(4.0, 0.9, 3.1), (2.0, 0.5, 3.0)])
def test_apfl_moves_its_share_and_its_own_adapter_at_the_mixture(target, share, own):
    """v = 3, w = 1, a = 0.5: u = 2. Target 4: gradient -2, <v - w, -2> = -4, v = 3 + 0.1 * 0.5 * 2."""
    both = Alternating(one(3.0), one(1.0), 0.5, 0.1, CPU)
    held = step(both, target, 0.1)
    parts = both.read()
    assert both.share == pytest.approx(share)
    assert parts[f"{PERSONAL}/w"].item() == pytest.approx(own)
    assert parts[f"{ADAPTER}/w"].item() == held == 1.0  # w is what the next step trains
    step(both, target, 0.1)  # (1 - target) down its own slope; neither v nor a is met
    assert both.read()[f"{ADAPTER}/w"].item() == pytest.approx(1 + 0.1 * (target - 1))
    assert both.read()[f"{PERSONAL}/w"].item() == pytest.approx(own)
    assert both.share == pytest.approx(share)


def test_the_share_stays_between_none_and_all():
    for target, share in ((100.0, 1.0), (-100.0, 0.0)):
        both = Alternating(one(3.0), one(1.0), 0.5, 0.1, CPU)
        step(both, target, 0.1)
        assert both.share == share
    assert mixture(one(3.0), one(0.1), 1.0) == one(3.0)
    assert mixture(one(3.0), one(0.1), 0.0) == one(0.1)


def local(axis, client, steps):
    w = (0.0, 1.0)[axis]
    for _ in range(steps):
        w -= 0.1 * (w - TARGETS[client][axis])
    return w


def test_apfl_is_fedavg_with_a_share_of_0_and_local_training_with_1(play):
    fedavg = play(FedAvg(FedAvgSettings()))
    none = play(APFL(APFLSettings(mixing=0.0, mixing_rate=0.0)))
    whole = play(APFL(APFLSettings(mixing=1.0, mixing_rate=0.0)))
    assert none.adapters == whole.adapters == fedavg.adapters  # whatever a is
    for client in TARGETS:
        assert none.kept[client][PERSONAL]["lora_w"].tolist() == [0.0, 1.0]  # a = 0 has no slope
        alone = [local(axis, client, 6) for axis in (0, 1)]
        assert whole.kept[client][PERSONAL]["lora_w"].tolist() == pytest.approx(alone)
        assert whole.kept[client][MIXING][MIXING].item() == 1.0


def test_apfl_s_share_follows_who_helps(play):
    """Client 0 has a quarter of the rows: the shared adapter goes to the other's target, its own to its own."""
    found = play(APFL(APFLSettings(mixing_rate=0.05)), rounds=8)
    shares = [found.kept[client][MIXING][MIXING].item() for client in (0, 1)]
    assert shares[0] > shares[1] and shares[0] > 0.5


def test_fedala_learns_the_start_by_hand():
    """v = 0, w = 1, (x - 0.25)^2 / 2, W = 1: slope 0.75 * 1, so W = 0.25 and x = 0.25."""
    start = Start(one(0.0), one(1.0), one(1.0), CPU)
    assert start.matters and start.mean == 1.0
    assert step(start, 0.25, 1.0) == pytest.approx(0.25) == start.mean


def test_fedala_s_weights_stay_between_both_ends_and_none_is_learnt_where_they_are_one():
    start = Start(one(0.0), one(1.0), one(1.0), CPU)
    step(start, -5.0, 1.0)
    start.clip(start.parameters)
    assert start.mean == 0.0
    assert not Start(one(2.0), one(2.0), one(1.0), CPU).matters
    start.parameters["w"].grad = torch.tensor([-0.02], dtype=torch.float64)
    start.normalise(start.parameters)
    assert start.parameters["w"].grad.item() == -1.0


def test_fedala_without_a_rate_is_fedavg(play):
    found = play(FedALA(FedALASettings(eta=0.0)))
    assert found.adapters == play(FedAvg(FedAvgSettings())).adapters
    assert WEIGHTS not in found.kept[0]


def test_fedala_s_second_round_by_hand(play):
    """Two steps of W from 1, at eta 0.5, each at x = v + W (w - v); then two of x at 0.1."""
    found = play(FedALA(FedALASettings(eta=0.5, first_passes=1)), rounds=2)
    first, learnt = play(FedAvg(FedAvgSettings()), rounds=1).adapters[0], []
    for client, targets in TARGETS.items():
        for axis, target in enumerate(targets):
            v, w, weight = local(axis, client, 2), first[axis], 1.0
            for _ in range(2):
                slope = (v + weight * (w - v) - target) * (w - v)
                weight = min(1.0, max(0.0, weight - 0.5 * slope))
            x = v + weight * (w - v)
            for _ in range(2):
                x -= 0.1 * (x - target)
            kept = found.kept[client]
            assert kept[WEIGHTS]["lora_w"][axis].item() == pytest.approx(weight)
            assert kept[ADAPTER]["lora_w"][axis].item() == pytest.approx(x)
            learnt.append(weight)
    assert min(learnt) < 1


def test_fedala_mixes_the_last_tensors_alone_in_passes_until_the_loss_settles(federate, experiment):
    own = experiment(
        method={"name": "fedala", "tensors": 2, "eta": 50.0, "first_passes": 14, "settled": 9.0},
        federation={"rounds": 2},
        training={"local_steps": 1},
    )
    records = []
    found = federate(own, after=lambda record, parts: records.append(record))
    first, second = records
    assert first.details[SHARED] == 1.0 and 0 < second.details[SHARED] < 1
    steps = [sum(c.steps for c in own.costs if c.client == 0) for own in records]
    assert steps == [1, 12]  # 11 passes of a step at least, as the round has one
    kept = found.parts.engine.store.slots(0)
    assert sorted(kept[WEIGHTS]) == sorted(found.adapter)[-2:]


def factors(a, b):
    return {"x.lora_A.weight": torch.tensor([[a]]), "x.lora_B.weight": torch.tensor([[b]])}


def judged(method, received, kept=None, own_start=False):
    """The product of what a client is judged by that began with 5 x 1."""
    held = {}
    client = SimpleNamespace(
        store=kept or {}, initial=factors(5.0, 1.0), own_start=own_start, model=SimpleNamespace(write=held.update)
    )  # fmt: skip
    method.load(client, Payload(received))
    return float(held["x.lora_B.weight"] @ held["x.lora_A.weight"])


@pytest.mark.parametrize(
    ("name", "settings", "fresh", "own", "kept"),
    [
        ("ditto", {}, 6.0, 5.0, 8.0),
        ("fedavg_ft", {}, 6.0, 5.0, 8.0),
        ("fedala", {}, 6.0, 5.0, 8.0),
        ("feddpa", {"mix": 0.25}, 6.0, 0.75 * 6 + 0.25 * 5, 0.75 * 6 + 0.25 * 8),
        ("feddat", {}, 6.0, (6 + 5) / 2, (6 + 8) / 2),
        # factors apart: (0.25 x 5 + 0.75 x 3) (0.25 x 1 + 0.75 x 2), and so on
        ("apfl", {"mixing": 0.25}, 6.0, 3.5 * 1.75, 3.25 * 2.0),
    ],
)
def test_a_client_is_judged_by_its_own_adapter_or_the_received_one(
    name, settings, fresh, own, kept
):
    """Received 3 x 2, kept 4 x 2; before a training its own is the received one, or that of an earlier run."""
    made, kind = METHODS[name]
    method, received = kind(made(**settings)), factors(3.0, 2.0)
    slot = PERSONAL if name in ("feddat", "apfl") else ADAPTER
    assert judged(method, received) == pytest.approx(fresh)
    assert judged(method, received, own_start=True) == pytest.approx(own)
    stored = {slot: factors(4.0, 2.0)}
    assert judged(method, received, stored) == pytest.approx(kept)
    assert judged(method, received, stored, own_start=True) == pytest.approx(kept)


def test_apfl_s_mixture_is_by_the_share_that_is_kept():
    method = APFL(APFLSettings(mixing=0.25))
    kept = {PERSONAL: factors(4.0, 2.0), MIXING: {MIXING: torch.tensor(0.5)}}
    assert judged(method, factors(3.0, 2.0), kept) == pytest.approx(3.5 * 2)


def test_fedala_learns_its_start_in_half_of_a_round_by_plain_steps_of_sgd(play, monkeypatch):
    found = play(FedALA(FedALASettings(eta=0.5, first_passes=1)), rounds=2)
    own = [training[2:] for training in found.trainings if training[1] == 0]
    assert own == [("", Part(0, 1), 0.1), ("start 0 ", Part(0, 2), 0.5), ("", Part(1, 2), 0.1)]
    monkeypatch.setattr("fedloom.methods.fedala.train_locally", lambda *given, **options: given[3])
    settings = TrainingSettings(
        optimizer="adamw", weight_decay=0.1, max_grad_norm=2.0, keep_optimizer_state=True,
        head_learning_rate=1.0, loraplus_lr_ratio=4.0, batch_size=3,
    )  # fmt: skip
    training = SimpleNamespace(
        model=None, share=None, objective=None, settings=settings, options={}
    )
    found = PlainSteps().train(training)
    plain = TrainingSettings(optimizer="sgd", max_grad_norm=0.0, batch_size=3)
    assert found == plain


@pytest.mark.parametrize(("steps", "expected"), [(9, 4), (4, 4), (2, 2)])
def test_a_pass_of_fedala_is_over_a_share_of_the_rows_and_within_a_round_s_work(steps, expected):
    """0.8 of 20 rows are 16, four batches of 5: the last is not full."""
    training = TrainingSettings(batch_size=5, local_steps=steps)
    client = SimpleNamespace(work=training.work(20, 1.0), training=training, share=range(20))
    assert FedALA(FedALASettings())._pass(client) == Work(steps=expected)
