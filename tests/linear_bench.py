"""A linear layer with LoRA on four clients, under real methods and their handlers, through encoded messages.

y = W x with an 8 x 8 target; each client sees two input directions and takes full-batch gradient steps.
It stands for no language model: signs, ranks and identities can be seen on it, in milliseconds.
"""

import math
from collections.abc import Generator
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import torch

from fedloom.aggregation.rules import AggregationSettings
from fedloom.federation.presence import Presence
from fedloom.federation.protocol import Cohort, Replies
from fedloom.methods import METHODS
from fedloom.methods.contract.client import Client, carried_out
from fedloom.models.backbone_delta import MOVED
from fedloom.training.results import LocalResult
from fedloom.wire.messages import Reply, decode, encode, require_finite

A, B = "x.lora_A.weight", "x.lora_B.weight"
SIZE, CLIENTS = 8, 4


class Model:
    """One layer with LoRA."""

    device = torch.device("cpu")
    stacked = None

    def __init__(self, rank, alpha, frozen_weight=None):
        self.scaling, self.flops, self.moved = alpha / rank, 0.0, {}
        self.parameters = {
            A: torch.nn.Parameter(torch.zeros(rank, SIZE)),
            B: torch.nn.Parameter(torch.zeros(SIZE, rank)),
        }

    def write(self, tensors):
        self.moved = {name: t for name, t in tensors.items() if name.startswith(MOVED)}
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                if name in tensors:
                    parameter.copy_(tensors[name])

    def read(self):
        return {name: p.detach().clone() for name, p in self.parameters.items()}

    def weight(self):
        whole = self.scaling * self.parameters[B] @ self.parameters[A]
        return whole + self.moved.get(f"{MOVED}x", 0.0)


@dataclass
class LinearClient(Client):
    """Minimises ||(W - W*) X_k||^2 / 2 by plain gradient steps."""

    target: object = None
    steps: int = 0
    rates: object = None
    trainings: list = field(default_factory=list)

    def training_steps(self, learning_rate, before_step=None, after_step=None, *, purpose="", frozen=(),
                       repeats=1, part=None, work=None, coordinates=None, driver=None):  # fmt: skip
        yield from ()
        self.trainings.append((self.round, self.id, purpose, part, learning_rate))
        tensors = self.model.parameters
        trained = tensors if coordinates is None else coordinates.parameters
        if coordinates is not None:
            coordinates.write(tensors)
        loss = torch.zeros(())
        for _ in range(self.steps):
            for parameter in trained.values():
                parameter.grad = None
            loss = self.gradients()
            if coordinates is not None:
                coordinates.pull_back(tensors)
            for name in frozen:
                tensors[name].grad = None
            if before_step:
                before_step(trained)
            with torch.no_grad():
                for name, parameter in trained.items():
                    if parameter.grad is not None:
                        parameter -= (
                            learning_rate * (self.rates or {}).get(name, 1.0) * parameter.grad
                        )
            if after_step:
                after_step(trained)
            if coordinates is not None:
                coordinates.write(tensors)
        return LocalResult(2, self.steps, 0, 0, {"loss": float(loss)})

    def row_losses(self, rows):
        return [float(self.gradients())], [1.0]

    def gradients(self):
        """Leave the gradients of both factors, s G A^T with G of W; return the loss."""
        with torch.no_grad():
            down, up = (self.model.parameters[name] for name in (A, B))
            whole = torch.zeros(SIZE, SIZE)
            own = isinstance(self.target, dict)
            directions = slice(None) if own else slice(2 * self.id, 2 * self.id + 2)
            target = self.target[self.id] if own else self.target
            whole[:, directions] = (self.model.weight() - target)[:, directions]
            down.grad, up.grad = (
                self.model.scaling * own for own in (up.T @ whole, whole @ down.T)
            )
            return whole.square().sum() / 2


def start(rank, seed=0):
    """Return A as LoRA draws it, and B of zeros."""
    torch.manual_seed(seed)
    down = torch.empty(rank, SIZE)
    torch.nn.init.kaiming_uniform_(down, a=math.sqrt(5))
    return {A: down, B: torch.zeros(SIZE, rank)}


def target_of(rank, seed=0):
    """Return a matrix of a rank with the Frobenius norm 2."""
    torch.manual_seed(100 + seed)
    whole = torch.randn(SIZE, rank) @ torch.randn(rank, SIZE)
    return 2 * whole / whole.norm()


@dataclass
class Outcome:
    """What came of rounds: the method, its states, requests and replies by (round, action, client), trainings."""

    method: object
    states: list
    sent: dict
    kept: dict
    cohorts: list
    trainings: list = field(default_factory=list)

    @property
    def state(self):
        return self.states[-1]

    def weight(self, scaling, state=None):
        """The served matrix."""
        found = self.method.shared(state or self.state)
        return scaling * found[B] @ found[A] + found.get(f"{MOVED}x", 0.0)


def play(name, *, rounds=1, steps=20, rate=0.2, rank=2, alpha=None, adapter=None, target=None, settings=None,
         rows=None, rates=None, ranks=None, state=None, turned=lambda client, tensors: tensors,
         there=lambda round, client: True, seed=0):  # fmt: skip
    """Play rounds.

    ``turned`` changes what a client has trained before it answers, ``there`` says who is in a round. With a
    target of its own (a dictionary) a client sees all input directions.
    """
    kind, cls = METHODS[name]
    own = kind(**(settings or {}))
    method, alpha = cls(own), alpha or float(rank)
    adapter = adapter or start(rank)
    rows = rows or dict.fromkeys(range(CLIENTS), 1)
    server = Model(rank, alpha)
    server.write(adapter)
    ranks = ranks or dict.fromkeys(rows, rank)
    method.setup(
        SimpleNamespace(model=server, seed=seed, cohort=len(rows), ranks=ranks, aggregation=AggregationSettings(), rounds=rounds)
    )  # fmt: skip
    kept = {client: {} for client in rows}
    found = Outcome(method, [], {}, kept, [])
    state = state or method.initial_state(adapter)
    for number in range(1, rounds + 1):
        whole = Presence.of(rows)
        asked = tuple(client for client in rows if there(number, client))
        cohort = Cohort(number, asked, replace(whole, available=asked), rate, last=number == rounds)
        generator = method.round(state, cohort)
        exchange = next(generator)
        try:
            while True:
                replies = []
                for client in exchange.requests:
                    model = Model(ranks[client], alpha * ranks[client] / rank)
                    read = model.read
                    model.read = lambda read=read, client=client: turned(client, read())
                    initial = {A: adapter[A][: ranks[client]], B: adapter[B][:, : ranks[client]]}
                    party = LinearClient(
                        id=client, round=number, model=model, initial=initial, share=range(rows[client]),
                        objective=None, training=SimpleNamespace(learning_rate=rate, amount_per="round"), seed=seed,
                        noise_seed=0, participations=1.0, rounds=rounds, store=dict(kept[client]),
                        target=target_of(2) if target is None else target, steps=steps, rates=rates, trainings=found.trainings,
                    )  # fmt: skip
                    schema = exchange.schemas.get(client, exchange.request_schema)
                    request = decode(exchange.requests[client], schema)
                    reply = method.handlers()[exchange.action](party, request)
                    reply = carried_out(reply) if isinstance(reply, Generator) else reply
                    kept[client] = party.store
                    payload = decode(encode(reply, exchange.reply_schema), exchange.reply_schema)
                    require_finite(payload)
                    if exchange.check is not None:
                        exchange.check(client, payload)
                    found.sent[number, exchange.action, client] = request, payload
                    replies.append(
                        Reply(
                            client,
                            decode(encode(reply, exchange.reply_schema), exchange.reply_schema),
                        )
                    )
                exchange = generator.send(Replies(replies))
        except StopIteration as stop:
            state = stop.value
        found.states.append(state)
        found.cohorts.append(cohort)
    return found


def error(found, target, scaling=1.0):
    """Squared relative error of the served matrix."""
    return float((found.weight(scaling) - target).square().sum() / target.square().sum())
