"""Two clients with two parameters, each with a quadratic loss, under the real handlers."""

from collections.abc import Generator
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import pytest
import torch

from fedloom.federation.presence import Presence
from fedloom.federation.protocol import Cohort, Replies
from fedloom.methods.contract.client import Client, carried_out
from fedloom.training.results import LocalResult
from fedloom.training.settings import TrainingSettings
from fedloom.wire.messages import Reply, decode, encode, require_finite

TARGETS = {0: (1.0, -1.0), 1: (3.0, 2.0), 2: (-2.0, 0.5)}
ROWS = {0: 1, 1: 3}
START = (0.0, 1.0)
RATE = 0.1
TRAINING = TrainingSettings(learning_rate=RATE, optimizer="sgd", local_steps=2)


class Model:
    device = torch.device("cpu")

    def __init__(self):
        self.parameters = {"lora_w": torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))}

    def write(self, tensors):
        with torch.no_grad():
            self.parameters["lora_w"].copy_(tensors["lora_w"])

    def read(self):
        return {"lora_w": self.parameters["lora_w"].detach().clone()}


@dataclass
class QuadraticClient(Client):
    """Minimises ||w - target||^2 / 2 by plain SGD, two steps a round."""

    steps: int = 2
    trainings: list = field(default_factory=list)

    def training_steps(
        self,
        learning_rate,
        before_step=None,
        after_step=None,
        *,
        purpose="",
        frozen=(),
        repeats=1,
        part=None,
        work=None,
        coordinates=None,
        driver=None,
    ):
        yield from ()  # needs nobody
        self.trainings.append((self.round, self.id, purpose, part, learning_rate))
        w = self.model.parameters["lora_w"]
        trained = self.model.parameters if coordinates is None else coordinates.parameters
        if coordinates is not None:
            coordinates.write(self.model.parameters)
        target = torch.tensor(TARGETS[self.id], dtype=torch.float64)
        for _ in range(self.steps * repeats):
            w.grad = w.detach() - target
            if coordinates is not None:
                coordinates.pull_back(self.model.parameters)
            if before_step:
                before_step(trained)
            with torch.no_grad():
                for own in trained.values():
                    if own.grad is not None:
                        own -= learning_rate * own.grad
                        own.grad = None
            if after_step:
                after_step(trained)
            if coordinates is not None:
                coordinates.write(self.model.parameters)
        return LocalResult(2, self.steps, 0, 0, {"loss": 1.0})

    def loss(self, batches):
        w = self.model.parameters["lora_w"].detach()
        return float((w - torch.tensor(TARGETS[self.id], dtype=torch.float64)).square().sum() / 2)


@pytest.fixture
def play():
    """Play rounds of a method through encoded messages; return its state after each, and all trainings.

    ``absent`` has the clients of ``rows`` that are not there, by round.
    """

    def run(method, rounds=3, cohort=(0, 1), steps=2, rows=ROWS, absent=None):
        model = Model()
        vars(method).setdefault("server", SimpleNamespace(sums_alone=False))
        kept, trainings = {client: {} for client in rows}, []
        state = method.initial_state({"lora_w": torch.tensor(START, dtype=torch.float64)})
        states = []
        for number in range(1, rounds + 1):
            away = (absent or {}).get(number, ())
            there = tuple(client for client in cohort if client not in away)
            whole = Presence.of(rows)
            presence = replace(whole, available=tuple(c for c in whole.members if c not in away))
            generator = method.round(
                state, Cohort(number, there, presence, RATE, last=number == rounds)
            )
            exchange = next(generator)
            try:
                while True:
                    replies = [
                        _answer(method, exchange, k, model, kept, steps, rows, trainings)
                        for k in exchange.requests
                    ]
                    exchange = generator.send(Replies(replies))
            except StopIteration as stop:
                state = stop.value
            states.append(state)
        return SimpleNamespace(
            adapters=[method.shared(s)["lora_w"].tolist() for s in states],
            states=states,
            kept=kept,
            trainings=trainings,
        )

    return run


def _answer(method, exchange, number, model, kept, steps, rows, trainings):
    client = QuadraticClient(
        id=number, round=exchange.round, model=model, initial={"lora_w": torch.tensor(START)},
        share=range(rows[number]), objective=None, training=TRAINING, seed=0, noise_seed=0, participations=1.0, rounds=3, store=dict(kept[number]),
        steps=steps if isinstance(steps, int) else steps[number], trainings=trainings,
    )  # fmt: skip
    request = decode(exchange.requests[number], exchange.request_schema)
    reply = method.handlers()[exchange.action](client, request)
    reply = carried_out(reply) if isinstance(reply, Generator) else reply
    kept[number] = client.store
    payload = decode(encode(reply, exchange.reply_schema), exchange.reply_schema)
    require_finite(payload)
    return Reply(number, payload)
