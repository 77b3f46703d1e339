"""FedDAT: who steps when, who teaches whom, and what is sent."""

from types import SimpleNamespace

import pytest
import torch

from fedloom.methods.bases.parameter_averaging import ADAPTER
from fedloom.methods.bases.personal_parts import PERSONAL
from fedloom.methods.bases.taught_objective import DIVERGENCE
from fedloom.methods.contract.client import carried_out
from fedloom.methods.feddat import DualAdapter, FedDAT, FedDATSettings, mixture
from fedloom.objectives.distillation import distillation_loss, divergences
from fedloom.tensors import part_of
from fedloom.wire.messages import Payload

CPU = torch.device("cpu")
KINDS = {
    "dpo": ("builtin:preferences", "dpo"),
    "sft": ("builtin:instructions", "sft"),
    "classification": ("builtin:labelled", "classification"),
}


def factors(down, up):
    return {
        "m.lora_A.weight": torch.tensor([down], dtype=torch.float64),
        "m.lora_B.weight": torch.tensor([[own] for own in up], dtype=torch.float64),
        "score.weight": torch.full((1, 2), down[0], dtype=torch.float64),
    }


def product(adapter):
    return adapter["m.lora_B.weight"] @ adapter["m.lora_A.weight"]


def test_the_divergence_by_hand():
    """Temperature 3, times 9: target (0, 0) against (3, 0), and the other way round."""
    level, tilted = torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 0.0]])
    assert divergences(tilted, level, 3.0).item() == pytest.approx(1.0810305626, rel=1e-6)
    assert divergences(level, tilted, 3.0).item() == pytest.approx(0.9984966450, rel=1e-6)
    assert divergences(tilted, tilted + 7.0, 3.0).item() == pytest.approx(0.0, abs=1e-6)
    rows, others = torch.randn(5, 4), torch.randn(5, 4)
    apart = divergences(rows, others, 2.0)
    assert apart.shape == (5,)
    torch.testing.assert_close(apart.mean(), distillation_loss(rows, others, 2.0))


def test_the_shared_adapter_steps_by_itself_and_the_own_one_in_the_mixture():
    """a0 = 1 (2, 0)^T, a2 = a1 = 3 (0, 1)^T on one input: the mixture is half of each product."""
    own, received = factors([1.0], [2.0, 0.0]), factors([3.0], [0.0, 1.0])
    both = DualAdapter(own, received, CPU)
    model = {n: torch.nn.Parameter(torch.zeros_like(t)) for n, t in mixture(own, received).items()}
    both.write(model)
    mixed = torch.tensor([[1.0], [1.5]], dtype=torch.float64)
    torch.testing.assert_close(product(model).detach(), product(received))  # a1 alone
    torch.testing.assert_close(product(both.teacher()), mixed)
    assert both.teacher()["score.weight"].tolist() == [[2.0, 2.0]]
    (product(model).sum() + model["score.weight"].sum()).backward()
    both.pull_back(model)
    grads = {n: p.grad for n, p in both.parameters.items()}
    assert all((grads[n] is None) == n.startswith(PERSONAL) for n in grads)
    assert grads[f"{ADAPTER}/m.lora_A.weight"].tolist() == [[1.0]]  # the sum of B
    assert grads[f"{ADAPTER}/m.lora_B.weight"].tolist() == [[3.0], [3.0]]
    with torch.no_grad():
        both.parameters[f"{ADAPTER}/m.lora_A.weight"] += 5.0
    before = product(received)
    for parameter in both.parameters.values():
        parameter.grad = None
    both.write(model)
    torch.testing.assert_close(product(model).detach(), mixed)  # of a2, not of a1 as it is now
    torch.testing.assert_close(product(both.teacher()), before)  # a1 before its step
    product(model).sum().backward()
    both.pull_back(model)
    grads = {n: p.grad for n, p in both.parameters.items()}
    assert all((grads[n] is None) == n.startswith(ADAPTER) for n in grads if "lora" in n)
    assert grads[f"{PERSONAL}/m.lora_A.weight"].tolist() == [[1.0]]  # half the sum of B_0
    both.write(model)
    assert product(both.teacher()).tolist() == mixed.tolist()
    assert product(model)[1].item() == 8.0  # a1 as it stepped


@pytest.mark.parametrize(("metrics", "apart"), [({}, 0.0), ({DIVERGENCE: 2.0}, 2.0)])
def test_a_client_without_a_step_reports_no_divergence(metrics, apart):
    asked = []

    def training_steps(rate, *, repeats, coordinates, driver):
        yield from ()
        asked.append((rate, repeats, driver.temperature, driver.strength))
        return SimpleNamespace(metrics={"loss": 1.0, **metrics})

    received = factors([3.0], [0.0, 1.0])
    model = SimpleNamespace(write=lambda tensors: None, device=CPU)
    client = SimpleNamespace(
        store={}, own_start=False, model=model, training_steps=training_steps, share=[0] * 7
    )
    method = FedDAT(FedDATSettings(temperature=2.0, distillation=0.5))
    request = Payload(received, {"learning_rate": 0.1})
    reply = carried_out(method.handlers()["train"](client, request))
    assert reply.metrics == {"loss": 1.0, DIVERGENCE: apart} and asked == [(0.1, 2, 2.0, 0.5)]
    assert all(torch.equal(reply.tensors[n], t) for n, t in received.items())
    assert client.store[PERSONAL].keys() == received.keys()


@pytest.fixture
def dual(experiment):
    """Make a small experiment with FedDAT on plain gradient steps."""

    def make(kind="sft", rounds=1, name="feddat", rate=0.5, **method):
        source, objective = KINDS[kind]
        return experiment(
            data={"source": source, "builtin_rows": 40},
            objective={"name": objective},
            method={"name": name, **method},
            federation={"rounds": rounds, "clients": 2},
            training={
                "local_steps": 4,
                "optimizer": "sgd",
                "learning_rate": rate,
                "max_grad_norm": 0.0,
            },
        )

    return make


@pytest.mark.parametrize("kind", [pytest.param("dpo", marks=pytest.mark.slow), "sft"])
def test_without_divergence_the_shared_adapter_is_fedavg_s_at_half_the_rate(dual, federate, kind):
    found = federate(dual(kind, distillation=0.0, weights="rows"))
    expected = federate(dual(kind, name="fedavg", rate=0.25))
    for name, tensor in expected.adapter.items():
        torch.testing.assert_close(found.adapter[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", [pytest.param(own, marks=pytest.mark.slow) for own in KINDS])
def test_the_first_step_has_no_divergence_and_the_own_adapter_is_never_sent(dual, federate, kind):
    answers, kept = [], {}

    def watch(parts):
        train = parts.local.handlers["train"]

        def handler(client, payload):
            reply = yield from train(client, payload)
            answers.append((client.round, reply.metrics[DIVERGENCE], reply.tensors))
            kept[client.round, client.id] = client.store[PERSONAL]
            return reply

        parts.local.handlers = {**parts.local.handlers, "train": handler}

    found = federate(dual(kind, rounds=2), watch)
    assert found.adapter.keys() == answers[0][2].keys()
    assert all(apart >= -1e-6 for _, apart, _ in answers)
    assert max(apart for number, apart, _ in answers if number == 2) > 0
    for own in kept.values():
        assert all(
            not torch.equal(own[name], reply[name])
            for _, _, reply in answers
            for name in own
            if "lora_B" in name
        )
    assert all(part_of(found.state.tensors, part) == {} for part in (PERSONAL, ADAPTER))


@pytest.mark.slow
def test_the_upload_follows_the_own_adapter_through_the_divergence_alone(dual, federate):
    def sent(**method):
        uploads = []

        def watch(parts):
            train = parts.local.handlers["train"]

            def handler(client, payload):
                if client.id == 0:
                    own = {n: 0 * t + ("lora_B" in n) * 0.3 for n, t in payload.tensors.items()}
                    if method.get("own"):
                        client.store[PERSONAL] = own
                reply = yield from train(client, payload)
                uploads.append(reply.tensors)
                return reply

            parts.local.handlers = {**parts.local.handlers, "train": handler}

        federate(dual(distillation=method["distillation"]), watch)
        return uploads[0]

    apart, without = (sent(distillation=0.0, own=own) for own in (True, False))
    assert all(torch.equal(apart[name], without[name]) for name in apart)
    apart, without = (sent(distillation=1.0, own=own) for own in (True, False))
    assert any(not torch.equal(apart[name], without[name]) for name in apart)
