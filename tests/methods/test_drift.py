"""FedDyn, FedNova, MOON and FedPTR: hand numbers, what they are equal to, and MOON's term on the real model.

The hand numbers are of two clients with quadratics in one coordinate, under the real handlers.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fedloom.aggregation.rules import AggregationSettings
from fedloom.aggregation.trajectory import descended, extrapolated, fitted, mismatch
from fedloom.errors import SettingsError
from fedloom.experiment.experiment import Experiment
from fedloom.federation.compression_messages import start_of
from fedloom.federation.presence import Presence
from fedloom.federation.protocol import Cohort, Replies
from fedloom.methods.contract.client import carried_out
from fedloom.methods.fedavg import FedAvg, FedAvgSettings
from fedloom.methods.feddyn import MOVES, FedDyn, FedDynSettings
from fedloom.methods.fednova import STEPS, FedNova, FedNovaSettings, gradient_factors
from fedloom.methods.fedprox import FedProx, FedProxSettings
from fedloom.methods.fedptr import UNFITTED, FedPTR, FedPTRSettings
from fedloom.methods.moon import CONTRAST, MOON, PREVIOUS, ContrastedModel, MOONSettings
from fedloom.objectives.contrastive import contrastive_loss, text_means
from fedloom.runs.assembly import assemble
from fedloom.runs.partitioning import partition_data
from fedloom.tensors import part_of
from fedloom.training.layout import budget_of
from fedloom.training.passes import StepLayout
from fedloom.training.results import LocalResult
from fedloom.training.settings import TrainingSettings
from fedloom.wire.messages import Payload, Reply, decode, encode

ALIKE = {0: 2, 1: 2}
"""Rows of clients that count alike also by rows."""


class Point:
    """A model of one number."""

    device = torch.device("cpu")

    def __init__(self):
        self.parameters = {"w": torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))}

    def write(self, tensors):
        with torch.no_grad():
            self.parameters["w"].copy_(tensors["w"])

    def read(self):
        return {"w": self.parameters["w"].detach().clone()}


@dataclass
class Quadratic:
    """A client with F(w) = curvature (w - target)^2 / 2: takes steps of SGD, or with 0 goes to the minimum."""

    curvature: float
    target: float
    steps: int = 0

    def __post_init__(self):
        self.model, self.store, self.share = Point(), {}, range(2)
        self.training = TrainingSettings(optimizer="sgd")

    def as_read(self, reply):
        return reply

    def slope(self, hook):
        w = self.model.parameters["w"]
        w.grad = self.curvature * (w.detach() - self.target)
        if hook:
            hook(self.model.parameters)
        return float(w.grad)

    def training_steps(self, rate, before_step=None, part=None):
        yield from ()
        w = self.model.parameters["w"]
        for _ in range(self.steps):
            moved = rate * self.slope(before_step)
            w.data -= moved
        if not self.steps:  # the slope is linear in w
            slopes = []
            for at in (0.0, 1.0):
                w.data.fill_(at)
                slopes.append(self.slope(before_step))
            w.data.fill_(slopes[0] / (slopes[0] - slopes[1]))
        return LocalResult(2, self.steps, 0, 0, {"loss": 1.0})


def rounds(method, clients, start, cohorts, rate=0.5):
    """Yield what each round sent, its state, and its details."""
    state = method.initial_state({"w": torch.tensor([start], dtype=torch.float64)})
    presence = Presence.of(dict.fromkeys(range(len(clients)), 2))
    for number, who in enumerate(cohorts, 1):
        cohort = Cohort(number, who, presence, rate)
        playing = method.round(state, cohort)
        exchange = next(playing)
        replies = []
        for k in who:
            request = decode(exchange.requests[k], exchange.request_schema)
            reply = carried_out(method.handlers()["train"](clients[k], request))
            reply = decode(encode(reply, exchange.reply_schema), exchange.reply_schema)
            replies.append(Reply(k, reply))
        with pytest.raises(StopIteration) as stop:
            playing.send(Replies(replies))
        state = stop.value.value
        yield float(request.tensors["w"]), state, cohort.details


def sent_next(method, state):
    """What FedDyn sends in the next round."""
    return float(method.shared(state)["w"] + part_of(state.tensors, MOVES)["w"])


def test_feddyn_by_hand():
    """F_1 = x^2 / 2, F_2 = 3 (x - 4)^2 / 2, alpha 2, from w = 0, each client at its minimum.

    Round 1: x = (0, 12 / 5), g = (0, -4.8), h = -(2 / 2) 2.4, w = 1.2 + 2.4 / 2. Round 2, around 2.4:
    x_1 = 2 * 2.4 / 3, x_2 = (12 + 4.8 - 4.8) / 5; w = 2.8; the optimum is 3.
    """
    method, clients = FedDyn(FedDynSettings(alpha=2.0)), [Quadratic(1, 0), Quadratic(3, 4)]
    played = rounds(method, clients, 0.0, [(0, 1)] * 40)
    expected = [(1.2, 2.4, (0.0, -4.8), -2.4), (2.0, 2.8, (1.6, -4.8), -1.6)]
    for mean, w, slopes, h in expected:
        _, state, details = next(played)
        assert float(method.shared(state)["w"]) == pytest.approx(mean)
        assert sent_next(method, state) == pytest.approx(w)
        found = [-2 * float(own.store[MOVES]["w"]) for own in clients]
        assert found == pytest.approx(slopes)
        moves = float(part_of(state.tensors, MOVES)["w"])
        assert -2 * moves == pytest.approx(h) and sum(found) == pytest.approx(2 * h)
        assert details["correction"] == pytest.approx(abs(moves))
    assert sent_next(method, next(played)[1]) == pytest.approx(2.96)
    *_, (_, last, _) = played
    assert sent_next(method, last) == pytest.approx(3.0, abs=1e-6)


def test_feddyn_divides_by_all_clients_where_one_is_away():
    """The first alone moves nothing; the second alone moves 2.4: h = -2.4, w = 2.4 + 1.2."""
    method, clients = FedDyn(FedDynSettings(alpha=2.0)), [Quadratic(1, 0), Quadratic(3, 4)]
    first, second = (state for _, state, _ in rounds(method, clients, 0.0, [(0,), (1,)]))
    assert sent_next(method, first) == 0.0
    assert sent_next(method, second) == pytest.approx(3.6)


def test_feddyn_scales_alpha_by_rows_as_the_authors_do():
    """Two rows of three on average: alpha 2 * 3 / 2 = 3, so x_2 = 12 / (3 + 3)."""
    own = Quadratic(3, 4)
    method = FedDyn(FedDynSettings(alpha=2.0, scaled=True))
    request = Payload(
        {"w": torch.zeros(1, dtype=torch.float64)}, {"learning_rate": 0.1, "mean_rows": 3.0}
    )
    reply = carried_out(method.handlers()["train"](own, request))
    assert float(reply.tensors["w"]) == pytest.approx(2.0)


def test_feddyn_s_first_round_without_its_terms_is_fedavg_bit_for_bit(play):
    found = play(FedDyn(FedDynSettings(alpha=1e-30)), rounds=1, rows=ALIKE)
    assert found.adapters == play(FedAvg(FedAvgSettings()), rounds=1, rows=ALIKE).adapters


def test_feddyn_s_sum_of_moves_is_that_of_its_clients_whoever_is_away(play):
    rows = {0: 1, 1: 3, 2: 2}
    found = play(
        FedDyn(FedDynSettings(alpha=0.5)), 3, (0, 1, 2), rows=rows, absent={1: {1}, 3: {0}}
    )
    own = sum(found.kept[k][MOVES]["lora_w"] for k in rows)
    assert torch.allclose(own / 3, part_of(found.states[-1].tensors, MOVES)["lora_w"])
    assert own.abs().max() > 0.1


def at_server(method, **training):
    """Give a method what it has on the server."""
    settings = TrainingSettings(optimizer="sgd", local_steps=3, **training)
    method.setup(
        SimpleNamespace(training=settings, participations=1.0, aggregation=AggregationSettings())
    )
    return method


def test_fednova_by_hand():
    """F = (x - c)^2 / 2, c = (0, 4), w = 1, eta 0.5, tau = (1, 3): w_k = (0.5, 3.625).

    d = (-0.5, 0.875), tau_eff = 2, w = 1 + 2 * 0.1875; FedAvg's is 2.0625.
    """
    clients = [Quadratic(1, 0, 1), Quadratic(1, 4, 3)]
    ((_, state, details),) = rounds(at_server(FedNova(FedNovaSettings())), clients, 1.0, [(0, 1)])
    assert float(state.tensors["w"]) == pytest.approx(1.375)
    assert details[STEPS] == 2.0
    ((_, state, _),) = rounds(FedAvg(FedAvgSettings()), clients, 1.0, [(0, 1)])
    assert float(state.tensors["w"]) == pytest.approx(2.0625)


@pytest.mark.parametrize(("limit", "kind"), [(1.990, "fednova"), (2.992, "fedavg")])
def test_fednova_s_limit_is_the_optimum_with_unequal_steps_and_fedavg_s_is_not(limit, kind):
    """The optimum is 2; a round at eta 0.01 goes towards the limit from either side."""
    clients = [Quadratic(1, 0, 1), Quadratic(1, 4, 3)]
    for start, side in ((limit - 0.003, 1), (limit + 0.003, -1)):
        method = FedAvg(FedAvgSettings())
        if kind == "fednova":
            method = at_server(FedNova(FedNovaSettings()))
        ((_, state, _),) = rounds(method, clients, start, [(0, 1)], rate=0.01)
        assert side * (state.tensors["w"].item() - start) > 0


def test_fednova_counts_gradients_by_their_factors():
    assert gradient_factors(3, momentum=0.9) == pytest.approx(5.61)
    assert gradient_factors(3, pull=0.1) == pytest.approx(2.71)
    assert gradient_factors(4) == 4.0 and gradient_factors(0) == 0.0
    w = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = torch.optim.SGD([w], lr=0.1, momentum=0.9)
    for _ in range(5):
        w.grad = 2.0 * w.detach() - 1.0  # mu = 2
        optimizer.step()
    assert gradient_factors(5, momentum=0.9, pull=0.2) == pytest.approx(float(w.detach()) / 0.1)


@pytest.mark.parametrize(("optimizer", "counted"), [("sgd", 2.44), ("adamw", 3.0)])
def test_fednova_with_a_pull_counts_steps_by_hand(optimizer, counted):
    """As above with mu = 0.4, so that a step keeps 0.8 of the way: the second's steps are -3, -0.9 and
    -0.27, 2.085 in all, of 1 + 0.8 + 0.64 gradients, or of steps of another optimizer; tau_eff is 2.
    """
    clients = [Quadratic(1, 0, 1), Quadratic(1, 4, 3)]
    for client in clients:
        client.training = TrainingSettings(optimizer=optimizer)
    method = at_server(FedNova(FedNovaSettings(mu=0.4)))
    ((_, state, details),) = rounds(method, clients, 1.0, [(0, 1)])
    assert details[STEPS] == 2.0
    assert float(state.tensors["w"]) == pytest.approx(1 + 2 * (-0.5 + 2.085 / counted) / 2)


@pytest.mark.parametrize(
    "training",
    [
        {"optimizer": "sgd", "learning_rate": 0.5},
        {"optimizer": "sgd", "keep_optimizer_state": True},
        {"optimizer": "adamw", "learning_rate": 5.0},
        {"optimizer": "adamw", "head_learning_rate": 1e-4},
    ],
)
def test_fednova_goes_with_steps_up_to_the_shared_adapter_and_with_counted_ones(training):
    """mu eta = 2 x 0.5 ends there; without momentum nothing of earlier rounds goes on."""
    table = {"objective": {"name": "classification"}, "data": {"source": "builtin:labelled"}}
    mu = 0.0 if "keep_optimizer_state" in training else 2.0
    Experiment.from_table({"method": {"name": "fednova", "mu": mu}, "training": training, **table})


def test_fednova_is_fedavg_where_steps_are_equal(play):
    found = play(at_server(FedNova(FedNovaSettings())))
    for one, other in zip(found.adapters, play(FedAvg(FedAvgSettings())).adapters, strict=True):
        assert one == pytest.approx(other, abs=1e-12)


def test_more_steps_than_any_client_can_make_are_out_of_range(play):
    method = at_server(FedNova(FedNovaSettings()), momentum=0.5)
    cohort = Cohort(1, (0, 1), Presence.of(ALIKE), 0.1)
    exchange = next(method.round(method.initial_state({"w": torch.zeros(1)}), cohort))
    (spec,) = [own for own in exchange.reply_schema.metrics if own.name == STEPS]
    assert spec.holds(6.0) and not spec.holds(6.01)


@pytest.mark.parametrize(
    ("method", "training", "words"),
    [
        ({}, {"optimizer": "sgd", "momentum": 0.9, "keep_optimizer_state": True}, "earlier rounds"),
        ({"mu": 1.0}, {"optimizer": "sgd", "head_learning_rate": 1e-4}, "one learning rate"),
        ({"mu": 30.0}, {"optimizer": "sgd", "learning_rate": 0.1}, "beyond the shared adapter"),
    ],
)
def test_fednova_refuses_what_would_make_its_factors_wrong(method, training, words):
    table = {
        "method": {"name": "fednova", **method},
        "training": training,
        "objective": {"name": "classification"},
        "data": {"source": "builtin:labelled"},
    }
    with pytest.raises(SettingsError, match=words) as told:
        Experiment.from_table(table)
    assert len(told.value.problems) == 1


@pytest.mark.parametrize(
    ("name", "admission", "words"),
    [
        (
            "fednova",
            {"max_change": 1.0},
            r"admission\.max_change: clients of .* their change a step",
        ),
        *(
            (name, {"max_change": 1.0, "on_excess": "clip"}, r'on_excess = "clip": .* keep a sum')
            for name in ("feddyn", "scaffold")
        ),
    ],
)
def test_bounds_that_a_method_does_not_go_with_are_refused(name, admission, words):
    with pytest.raises(SettingsError, match=words) as told:
        Experiment.from_table({"method": {"name": name}, "admission": admission})
    assert len(told.value.problems) == 1
    if name != "fednova":
        Experiment.from_table({"method": {"name": name}, "admission": {"max_change": 1.0}})


def rows_of(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def test_the_contrastive_term_by_hand():
    """z = z_g = (1, 0), z_p = (0, 1), tau 0.5: ln(1 + e^-2); alike: ln 2; none: 0."""
    z, z_p = rows_of((1, 0), (3, 0)), rows_of((0, 1), (0, 2))
    assert contrastive_loss(z, z, [z_p], 0.5).tolist() == pytest.approx(
        [math.log1p(math.exp(-2))] * 2
    )
    own = z.clone().requires_grad_()
    alike = contrastive_loss(own, z_p, [z_p], 0.5)
    assert alike.tolist() == pytest.approx([math.log(2)] * 2)
    alike.sum().backward()
    assert own.grad.abs().max() == 0
    assert contrastive_loss(z, z, [], 0.5).tolist() == [0.0, 0.0]
    three = contrastive_loss(z, z, [z_p, z], 0.5)
    assert three[0] == pytest.approx(math.log(2 + math.exp(-2)))


def test_means_are_over_each_text_s_own_tokens():
    mask = torch.tensor([[False, True, True], [False, False, False], [True, False, False]])
    states = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    assert text_means(states, mask).tolist() == [[2.0, 3.0], [0.0, 0.0], [5.0, 6.0]]


TASKS = {
    "sft": {"objective": {"name": "sft"}, "data": {"source": "builtin:instructions"}},
    "classification": {
        "objective": {"name": "classification"},
        "data": {"source": "builtin:labelled"},
    },
}


@pytest.fixture
def contrasted(experiment):
    """Make a real model with MOON's term, a batch of a client for it, and its objective."""

    def make(task, others, mu=1.0):
        sections = {"adapter": {"rank": 2}, **TASKS[task]}
        sections["data"] = {**sections["data"], "builtin_rows": 24}
        built = experiment(**sections)
        parts = assemble(built, partition_data(built))
        model = parts.local.resources[0].model if 0 in parts.local.resources else parts.model
        share = parts.local.shares[0]
        lay_out = StepLayout(model, share, budget_of(built.training, model), 1 << 30)
        adapters = [others(parts.initial, number) for number in range(2)]
        view = ContrastedModel(model, adapters, MOONSettings(mu=mu))
        return view, lay_out.batches(np.arange(4)), parts.objective

    return make


def shifted(initial, number):
    """Other adapters, so far away that hidden states move."""
    torch.manual_seed(number)
    return {name: tensor + 0.3 * torch.randn_like(tensor) for name, tensor in initial.items()}


@pytest.mark.parametrize("task", TASKS)
def test_the_term_is_of_hidden_states_of_three_models(contrasted, task):
    view, (part,), objective = contrasted(task, shifted, mu=2.0)
    before = {name: tensor.clone() for name, tensor in view.read().items()}
    objective.loss(view, part, None)
    found = view.penalty()
    states = []
    for adapter in (before, *view.others):
        view.write(adapter)
        with torch.no_grad():
            output = view.model(
                input_ids=part.sequences.input_ids,
                attention_mask=part.sequences.attention_mask,
                output_hidden_states=True,
            )
        hidden = output.hidden_states[-1]
        if task == "classification":
            ends = part.sequences.attention_mask.sum(-1) - 1
            states.append(hidden[torch.arange(len(hidden)), ends])
        else:
            masks = part.sequences.completion_mask[:, 1:]
            pairs = zip(hidden[:, :-1], masks, strict=True)
            states.append(torch.stack([own[mask].mean(0) for own, mask in pairs]))
    expected = 2.0 * contrastive_loss(states[0], states[1], states[2:], 0.5).mean()
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    assert view.penalty() is None


def test_alike_models_give_no_gradient_and_others_do(contrasted):
    for others, gradient in ((lambda initial, _: initial, False), (shifted, True)):
        view, (part,), objective = contrasted("sft", others)
        objective.loss(view, part, None)
        term = view.penalty()
        term.backward()
        largest = max(
            float(p.grad.abs().max()) for p in view.parameters.values() if p.grad is not None
        )
        assert (largest > 1e-5) == gradient
        assert gradient or term.item() == pytest.approx(math.log(2))


def test_moon_without_its_weight_is_fedavg_bit_for_bit(play):
    found = play(MOON(MOONSettings(mu=0.0)))
    assert found.adapters == play(FedAvg(FedAvgSettings())).adapters


def test_moon_has_its_term_from_a_client_s_second_round_on(federate, experiment):
    records = []
    own = experiment(method={"name": "moon", "mu": 5.0}, training={"local_steps": 2})
    federate(own, after=lambda record, parts: records.append(record))
    first, second = records
    assert first.details[CONTRAST] == 0.0 and 0 < second.details[CONTRAST] < 2
    losses = [record.train["loss"] for record in records]
    assert all(0 < loss < 1 for loss in losses)  # the term, 5 times about ln 2, is not in it
    flops = [sum(c.flops for c in own.costs if c.client == 0) for own in records]
    assert 1.3 < flops[1] / flops[0] < 2  # two forward passes more


def test_moon_keeps_the_adapters_that_it_sent_last(play):
    found = play(MOON(MOONSettings(mu=0.0, buffer=2)), rounds=3)
    own = found.kept[0]
    assert set(own) == {PREVIOUS, f"{PREVIOUS} 1"}
    w = found.adapters[1][0]  # received in round 3; two steps of 0.1 towards 1
    assert own[PREVIOUS]["lora_w"][0].item() == pytest.approx(1 - 0.81 * (1 - w))
    w = found.adapters[0][0]
    assert own[f"{PREVIOUS} 1"]["lora_w"][0].item() == pytest.approx(1 - 0.81 * (1 - w))


def squares(point, synthetic):
    """h / 2 (w - a)^2 with h = 1."""
    return (point["w"] - synthetic["a"]).square().sum() / 2


def test_a_trajectory_is_projected_by_hand():
    """One step at h eta 0.5 takes 0 to 1 where a = 2, and 1 to 1.5; so does beta 0.5."""
    before, now, synthetic = (
        {n: torch.tensor([v])} for n, v in (("w", 0.0), ("w", 1.0), ("a", 0.0))
    )
    found, missed = fitted(synthetic, squares, before, now, (1, 0.5), (300, 0.05))
    assert found["a"].item() == pytest.approx(2.0, abs=1e-3) and missed < 1e-6
    assert descended(now, found, squares, 1, 0.5)["w"].item() == pytest.approx(1.5, abs=1e-3)
    assert descended(now, found, squares, 0, 0.5)["w"].item() == 1.0  # no step: FedProx
    assert extrapolated(before, now, 0.5)["w"].item() == 1.5
    assert mismatch(before, before, now).item() == 1.0


def test_a_client_is_pulled_towards_the_projection():
    """From 1, 0.5 ahead: (w - 4)^2 / 2 + 1 / 2 (w - 1.5)^2 has its minimum at 2.75."""
    own, method = Quadratic(1, 4), FedPTR(FedPTRSettings(strength=1.0))
    sent = {n: torch.tensor([v], dtype=torch.float64) for n, v in (("w", 1.0), ("offset/w", 0.5))}
    reply = carried_out(method.handlers()["train"](own, Payload(sent, {"learning_rate": 0.1})))
    assert reply.tensors["w"].item() == pytest.approx(2.75) and set(reply.tensors) == {"w"}


def test_what_fedptr_sends_first_is_what_every_client_holds():
    """So that a codec of [wire] begins with changes of 0, and its errors are small as the offset is."""
    method = FedPTR(FedPTRSettings())
    adapter = {"w": torch.tensor([3.0, -2.0])}
    state = method.initial_state(adapter)
    exchange = next(method.round(state, Cohort(1, (0,), Presence.of(ALIKE), 0.1)))
    sent = decode(exchange.requests[0], exchange.request_schema).tensors
    held = start_of(exchange.request_schema.tensors, adapter)
    assert sent.keys() == held.keys() and all(torch.equal(sent[n], held[n]) for n in held)


def test_fedptr_without_its_term_is_fedavg_and_without_a_move_fedprox(play):
    none = play(FedPTR(FedPTRSettings(strength=0.0)))
    assert none.adapters == play(FedAvg(FedAvgSettings())).adapters
    still = play(FedPTR(FedPTRSettings(strength=0.5, beta=0.0)))
    assert still.adapters == play(FedProx(FedProxSettings(mu=0.5))).adapters
    ahead = play(FedPTR(FedPTRSettings(strength=0.5)))
    assert ahead.adapters[0] == still.adapters[0] and ahead.adapters[1] != still.adapters[1]


@pytest.mark.parametrize("task", TASKS)
def test_synthetic_examples_make_some_of_a_real_move(federate, experiment, task):
    records = []
    small = {"projection": "synthetic", "fit_steps": 6, "examples": 2, "length": 4}
    sections = {**TASKS[task], "method": {"name": "fedptr", **small}}
    sections["data"] = {**sections["data"], "builtin_rows": 24}
    own = experiment(**sections, training={"local_steps": 1, "learning_rate": 1e-2})
    federate(own, after=lambda record, parts: records.append(record))
    assert UNFITTED not in records[0].details and records[1].details[UNFITTED] < 0.99
    ahead = [c for c in records[1].costs if c.phase == "project"]
    assert [c.client for c in ahead] == [-1] and ahead[0].flops > 0


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        (
            {"adapter": {"kind": "prompt"}},
            "adapter.kind = 'prompt': method.name = 'fedptr' trains on",
        ),
        ({"training": {"gradient_checkpointing": True}}, "needs gradients of gradients"),
    ],
)
def test_fedptr_refuses_what_has_no_gradients_of_second_order(sections, words):
    with pytest.raises(SettingsError, match=words) as told:
        Experiment.from_table({"method": {"name": "fedptr", "projection": "synthetic"}, **sections})
    assert len(told.value.problems) == 1
    Experiment.from_table({"method": {"name": "fedptr"}, **sections})


def test_metrics_are_averaged_by_rows_over_those_that_report_them():
    def reply(client, rows, **metrics):
        return Reply(client, Payload({}, {"examples": float(rows)}, metrics))

    replies = Replies([reply(0, 1, a=2.0), reply(1, 3, a=4.0), reply(2, 5)])
    assert replies.reported("a") == pytest.approx(3.5) and replies.reported("b") is None


@pytest.mark.parametrize(("missed", "ahead"), [(1.0, 3.0), (0.5, 9.0)])
def test_fedptr_stays_where_synthetic_examples_make_nothing_of_the_last_move(
    monkeypatch, missed, ahead
):
    """From 0 to 3: drawn examples go 0.3 x 3 of it in two steps, 0.45 each."""
    scales, cost = [], SimpleNamespace()
    loss = SimpleNamespace(
        without_dropout=nullcontext,
        examples=lambda count, length, seed, round: (count, length, seed, round),
        scaled=lambda drawn, at, size: scales.append(size) or drawn,
    )
    for name, own in {
        "EmbeddingLoss": lambda model: loss,
        "fitted": lambda drawn, *rest: (drawn, missed),
        "descended": lambda *given: {"w": torch.tensor([9.0])},
    }.items():
        monkeypatch.setattr(f"fedloom.methods.fedptr.{name}", own)
    method = FedPTR(FedPTRSettings(projection="synthetic", steps=2))
    model = SimpleNamespace(flops=5.0, device=torch.device("cpu"))
    ledger = SimpleNamespace(measure=lambda *given: nullcontext(cost))
    method.server = SimpleNamespace(model=model, ledger=ledger, seed=0)
    cohort = Cohort(1, (0,), Presence.of({0: 1}), 0.1)
    before, now = {"w": torch.tensor([0.0])}, {"w": torch.tensor([3.0])}
    found = method._projected(before, now, cohort)
    assert found["w"].item() == ahead and scales == [pytest.approx(0.45)]
    assert cohort.details[UNFITTED] == missed and cost.flops == 0.0
    assert method._projected(now, now, cohort) is now  # nothing has moved
