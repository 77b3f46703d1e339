"""FedKSeed: its steps and sums by hand, what travels, and what is refused."""

import hashlib
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fedloom.errors import MessageError, SettingsError
from fedloom.experiment.experiment import Experiment
from fedloom.federation.presence import Presence
from fedloom.federation.protocol import Cohort
from fedloom.methods.fedkseed import COUNTS, MAGNITUDES, FedKSeed, FedKSeedSettings
from fedloom.randomness import portable_normals
from fedloom.tensors import State
from fedloom.training import zeroth_order
from fedloom.training.layout import budget_of
from fedloom.training.optimizers import make_optimizer
from fedloom.training.passes import StepLayout
from fedloom.training.results import Totals
from fedloom.training.settings import TrainingSettings
from fedloom.training.steps import accumulate_gradients, graphs_of, update
from fedloom.training.zeroth_order import (
    SCALARS,
    SEEDS,
    SUMS,
    ZerothOrder,
    direction,
    flattened,
    moved,
    probabilities,
    unflattened,
)
from fedloom.wire.messages import Payload, Reply, decode, encode

START = {"w": torch.tensor([1.0, 2.0])}
BY_HAND = {1: np.array([1.0, 0.0], np.float32), 2: np.array([1.0, 1.0], np.float32)}


@pytest.fixture
def by_hand(monkeypatch):
    monkeypatch.setattr(zeroth_order, "direction", lambda seed, j, size: BY_HAND[j])


def reply(client, rows, seeds, scalars):
    tensors = {SEEDS: torch.tensor(seeds, dtype=torch.int16), SCALARS: torch.tensor(scalars)}
    return Reply(client, Payload(tensors, {"examples": rows}))


def test_the_sums_of_histories_are_fedavg_of_the_models(by_hand):
    """|w|^2 / 2 from w = (1, 2), eta 0.1, z_1 = (1, 0), z_2 = (1, 1), of which g = w z.

    Client 1 draws 1, 2: g = 1, w = (.9, 2); g = 2.9, w = (.61, 1.71). Client 2 draws 2, 2: g = 3,
    w = (.7, 1.7); g = 2.4, w = (.46, 1.46). The sums of g are (.5, 4.15), w = (.535, 1.585): the mean.
    """
    method = FedKSeed(FedKSeedSettings(candidates=3, sampling="weighted"))
    before = method.initial_state(START).tensors
    replies = [reply(0, 5.0, [1, 2], [-0.1, -0.29]), reply(1, 5.0, [2, 2], [-0.3, -0.24])]
    after = method._added(before, replies, 0.1)
    assert after[SUMS].tolist() == pytest.approx([0.0, -0.05, -0.415])
    assert moved(START, 0, after[SUMS]).tolist() == pytest.approx([0.535, 1.585])
    assert after[MAGNITUDES].tolist() == pytest.approx([0.0, 1.0, 2.9 + 3.0 + 2.4])
    assert after[COUNTS].tolist() == [0, 1, 3]
    unequal = [reply(0, 1.0, [1, 2], [-0.1, -0.29]), reply(1, 3.0, [2, 2], [-0.3, -0.24])]
    assert method._added(before, unequal, 0.1)[SUMS].tolist() == pytest.approx(
        [0.0, -0.1 / 4, -0.29 / 4 - 0.54 * 3 / 4]
    )


def test_a_client_s_history_is_its_way(by_hand):
    """Client 1 of the case above, by the optimizer of the loop of steps."""
    own = ZerothOrder(
        flattened(START), 0, 1e-3, np.full(3, 1 / 3), np.random.default_rng(0), torch.device("cpu")
    )
    model = {"w": torch.nn.Parameter(torch.zeros(2))}
    settings = TrainingSettings(optimizer="sgd", learning_rate=0.1, max_grad_norm=0)
    optimizer = make_optimizer(own.parameters, settings, 0.1)
    own.write(model)
    for j in (1, 2):
        w = model["w"].detach()
        own.along = j, BY_HAND[j]
        own.parameters[SUMS].grad = torch.zeros(3).index_fill_(0, torch.tensor(j), 1.0) * float(
            w @ torch.from_numpy(BY_HAND[j])
        )
        update(own.parameters, optimizer, settings)
        own.write(model)
    assert model["w"].tolist() == pytest.approx([0.61, 1.71])
    assert own.history[SEEDS].tolist() == [1, 2] and own.history[SEEDS].dtype == torch.int16
    assert own.history[SCALARS].tolist() == pytest.approx([-0.1, -0.29])


def test_probabilities_are_the_softmax_of_mean_magnitudes():
    """(3, 1, 2) brought to [0, 1] is (1, 0, .5): e, 1 and e^.5 over 5.36700."""
    found = probabilities(torch.tensor([3.0, 1.0, 2.0]))
    assert found.tolist() == pytest.approx([0.50648, 0.18632, 0.30720], abs=1e-5)
    assert probabilities(torch.zeros(4)).tolist() == [0.25] * 4


def test_one_scalar_counts_a_thousand_times_the_learning_rate_at_most():
    method = FedKSeed(FedKSeedSettings(candidates=3, sampling="weighted"))
    before = method.initial_state(START).tensors
    after = method._added(before, [reply(0, 1.0, [0, 1], [-99.0, -101.0])], 0.1)
    assert after[MAGNITUDES].tolist() == pytest.approx([990.0, 1000.0, 0.0])
    assert after[SUMS].tolist() == [-99.0, -101.0, 0.0]


def test_clients_are_sent_mean_magnitudes_and_answer_with_as_many_steps_as_they_can_make():
    """Sums of 0, 2 and 6 over 0, 1 and 3 sights are means of 0, 2 and 2."""
    method = FedKSeed(FedKSeedSettings(candidates=3, sampling="weighted"))
    training = TrainingSettings(local_steps=5)
    method.server = SimpleNamespace(training=training, participations=1.0)
    tensors = {
        SUMS: torch.ones(3),
        MAGNITUDES: torch.tensor([0.0, 2.0, 6.0]),
        COUNTS: torch.tensor([0, 1, 3], dtype=torch.int32),
    }
    cohort = Cohort(1, (0, 1), Presence.of({0: 1, 1: 3}), 0.1)
    exchange = next(method.round(State(tensors), cohort))
    request = decode(exchange.requests[0], exchange.request_schema)
    assert request.tensors.keys() == {SUMS, MAGNITUDES}
    assert request.tensors[MAGNITUDES].tolist() == [0.0, 2.0, 2.0]
    shapes = {spec.name: (spec.shape, spec.ragged) for spec in exchange.reply_schema.tensors}
    assert shapes == {SEEDS: ((5,), True), SCALARS: ((5,), True)}


@pytest.mark.parametrize(("seeds", "sound"), [([0, 2], True), ([], True), ([3], False), ([-1, 1], False)])  # fmt: skip
def test_seeds_are_those_of_the_candidates(seeds, sound):
    method = FedKSeed(FedKSeedSettings(candidates=3))
    own = reply(0, 1.0, seeds, [1.0] * len(seeds)).payload
    if sound:
        method._check_history(0, own)
        return
    with pytest.raises(MessageError, match="none of the 3 candidates"):
        method._check_history(0, own)


def test_sums_of_another_number_of_seeds_are_refused():
    method = FedKSeed(FedKSeedSettings(candidates=3))
    client = SimpleNamespace(seed=0, model=SimpleNamespace(allowance=SimpleNamespace(check=None)))
    for size in (2, 4):
        with pytest.raises(MessageError, match=f"{size} sums, for 3 seeds"):
            method._received(client, START, Payload({SUMS: torch.zeros(size)}))


def test_directions_are_the_same_bits_everywhere_and_normal():
    found = direction(7, 3, 1_000_003)
    assert len(found) == 1_000_003 and found.dtype == np.float32
    assert abs(found.mean()) < 5e-3 and found.std() == pytest.approx(1, abs=3e-3)
    assert (np.abs(found) < 1).mean() == pytest.approx(0.68269, abs=2e-3)
    assert (found**4).mean() == pytest.approx(3, abs=0.05)
    assert np.array_equal(direction(7, 3, 10), found[:10])
    other = direction(7, 4, 1_000_003)
    assert abs(np.corrcoef(found, other)[0, 1]) < 5e-3
    assert (
        hashlib.sha256(portable_normals(5, 1001).tobytes()).hexdigest()[:16] == "8b407b1fefaefd2e"
    )


def test_the_difference_of_two_losses_is_the_gradient_along_the_direction(experiment, federate):
    """On real pairs, beside what a backward pass says."""
    parts = federate(experiment(federation={"rounds": 1}, training={"local_steps": 2})).parts
    model, share, settings = parts.model, parts.local.shares[0], parts.local.training
    objective = parts.objective.for_client(share.tokens.labels)
    graphs = graphs_of(settings, model, share)
    batches = StepLayout(model, share, budget_of(settings, model), graphs).batches(np.arange(6))
    accumulate_gradients(model, objective, batches, Totals(), graphs)
    slope = flattened({name: p.grad for name, p in model.parameters.items()})
    own = ZerothOrder(
        flattened(model.read()), 0, 1e-3, np.full(8, 1 / 8), np.random.default_rng(2), model.device
    )
    before, totals = model.read(), Totals()
    with model.evaluating():
        found = own._derivative(SimpleNamespace(model=model), objective, batches, totals)
    j, z = own.along
    g = float(own.parameters[SUMS].grad[j])
    assert g == pytest.approx(float(slope @ z), rel=0.02, abs=1e-4) and abs(g) > 1e-3
    assert totals.examples == 6 and found.loss == pytest.approx(
        totals.result({}).metrics["loss"], rel=1e-2
    )
    put_back = unflattened(own.whole, before)
    assert all(torch.equal(put_back[name], t) for name, t in before.items())


@pytest.mark.parametrize(
    ("kind", "sampling"),
    [
        ("full", "weighted"),
        pytest.param("full", "uniform", marks=pytest.mark.slow),
        pytest.param("lora", "uniform", marks=pytest.mark.slow),
        pytest.param("lora", "weighted", marks=pytest.mark.slow),
    ],
)
def test_rounds_send_seeds_and_scalars_alone(experiment, federate, kind, sampling):
    """With LoRA's factors, and with the layers of the last block themselves."""
    adapter = {"lora": {}, "full": {"rank": 8, "kind": "full", "layers": 1}}[kind]
    found = federate(
        experiment(
            method={"name": "fedkseed", "candidates": 64, "sampling": sampling},
            adapter=adapter,
            training={"learning_rate": 1e-3, "local_steps": 3},
        )
    )
    sums, initial = found.state.tensors[SUMS], found.parts.initial
    assert 0 < int((sums != 0).sum()) <= 2 * 3 * 3
    whole = flattened(initial).astype(np.float64)
    for j in range(64):
        whole += float(sums[j]) * direction(0, j, len(whole))
    assert np.abs(flattened(found.adapter) - whole).max() < 1e-6
    assert np.abs(whole - flattened(initial)).max() > 1e-4
    if sampling == "weighted":
        assert int(found.state.tensors[COUNTS].sum()) == 2 * 3 * 3
    for client in range(3):
        (cost,) = [c for c in found.costs(client) if c.phase == "train"]
        assert cost.bytes_up < 3 * 6 + 700
        assert cost.bytes_down < 64 * 4 * (2 if sampling == "weighted" else 1) + 400


@pytest.mark.slow
def test_a_round_of_the_paper_s_size_is_below_20_kilobytes(experiment, federate):
    """4,096 candidates and 200 steps: 16,384 bytes down, 1,200 up, and headers."""
    found = federate(
        experiment(
            method={"name": "fedkseed"},
            federation={"rounds": 1, "clients": 1},
            training={"local_steps": 200, "batch_size": 1},
            adapter={"layers": 1, "targets": ["q_proj"]},
        )
    )
    (cost,) = [c for c in found.costs(0) if c.phase == "train"]
    assert 16_384 + 1_200 < cost.bytes_down + cost.bytes_up < 18_500


@pytest.mark.parametrize(
    ("seeds", "scalars", "words"),
    [
        ([0, 9], [1.0, 1.0], "none of the 8 candidates"),
        ([-1], [1.0], "none of the 8 candidates"),
        ([1, 2], [1.0], "not as many scalars"),
        ([1], [float("nan")], "NaN"),
        ([1] * 4, [1.0] * 4, "4"),
    ],
)
def test_a_history_that_is_none_leaves_its_client_out(experiment, federate, seeds, scalars, words):
    settings = experiment(
        method={"name": "fedkseed", "candidates": 8},
        training={"local_steps": 3},
        federation={"rounds": 1, "quorum": 0.5},
    )

    def break_(parts):
        plain = parts.engine.answer

        def answer(exchange, client):
            found = plain(exchange, client)
            if client != 1:
                return found
            tensors = {
                SEEDS: torch.tensor(seeds, dtype=torch.int16),
                SCALARS: torch.tensor(scalars),
            }
            own = exchange.reply_schema
            specs = tuple(replace(spec, shape=(9,)) for spec in own.tensors)
            wide = replace(own, tensors=specs)
            data = encode(Payload(tensors, {"examples": 1.0}), wide)
            data = data.replace(wide.digest.encode(), own.digest.encode())
            return replace(found, data=data)

        parts.engine.answer = answer

    found = federate(settings, break_)
    assert list(found.records[0].rejected) == [1] and words in found.records[0].rejected[1]


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"training": {"weight_decay": 0.1}}, "training.weight_decay"),
        ({"training": {"optimizer": "sgd", "momentum": 0.9}}, "training.momentum"),
        ({"training": {"optimizer": "adam"}}, 'makes steps of SGD: use "sgd"'),
        ({"training": {"keep_optimizer_state": True}}, "training.keep_optimizer_state"),
        ({"adapter": {"dropout": 0.1}}, "compares losses without dropout"),
        ({"admission": {"max_change": 1.0}}, "sends steps and no parameters"),
        ({"aggregation": {"rule": "median"}}, "puts updates together in a way of its own"),
        ({"method": {"candidates": 40_000}}, "method.candidates = 40000"),
        ({"method": {"epsilon": 0.0}}, "method.epsilon = 0"),
    ],
)
def test_what_it_does_not_go_with_is_told_before_anything_is_trained(table, sections, words):
    own = {**sections, "method": {"name": "fedkseed", **sections.get("method", {})}}
    merged = {name: {**table.get(name, {}), **section} for name, section in own.items()}
    with pytest.raises(SettingsError) as told:
        Experiment.from_table({**table, **merged})
    assert any(words in line for line in told.value.problems)
