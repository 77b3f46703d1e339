"""What an evaluation says where all rows are at the server, and where it has no model."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from fedloom.federation.records import Evaluation
from fedloom.methods.contract.federated_evaluation import Evaluator
from fedloom.wire.messages import Payload, Reply, decode


class Rows(list):
    """Held-out rows that any model gets right for the share that is said."""

    sample, kind = "which rows are right", "preference"

    def score(self, model):
        model.flops += 10.0
        return {"accuracy": sum(self) / len(self)}


class Model:
    flops = 5.0
    written = None

    def write(self, adapter):
        self.written = adapter


class Costs:
    def __init__(self):
        self.cost = SimpleNamespace()

    @contextmanager
    def measure(self, round, client, phase):
        yield self.cost


def judged(adapter, round=2):
    method = SimpleNamespace(
        shared=lambda state: adapter, sent_for_evaluation=lambda state: adapter, pools_data=True
    )
    evaluator = Evaluator(method, Rows([1, 0]), {}, {3: Rows([1, 1, 1, 0])}, (), 2, 5, "preference")
    model, ledger = Model(), Costs()
    return evaluator.evaluate("state", round, None, model, ledger, None), model, ledger.cost


def test_one_model_is_judged_on_the_global_rows_and_on_those_of_clients():
    found, model, cost = judged({"w": 1})
    own = {3: {"accuracy": 0.75, "examples": 4}}
    assert found == Evaluation({"accuracy": 0.5}, own, "which rows are right", kept=False)
    assert model.written == {"w": 1} and (cost.flops, cost.examples) == (20.0, 2)


def test_without_a_model_at_the_server_nothing_is_judged_there():
    found, model, _ = judged(None)
    assert found == Evaluation({}, {}) and model.written is None


def test_every_so_many_rounds_and_after_the_last():
    assert [round for round in range(6) if judged({"w": 1}, round)[0] is not None] == [0, 2, 4, 5]
    assert [judged({"w": 1}, round)[0].kept for round in (0, 2, 5)] == [True, False, True]


class Asked:
    """An engine and an admission that answer at once with what clients report."""

    def __init__(self, **metrics):
        self.metrics, self.exchange_of = metrics, None

    def sizes(self):
        return {1: 5, 2: 5, 3: 5}

    def without_paused(self, exchange):
        return exchange

    def exchange(self, exchange):
        self.exchange_of = exchange
        return exchange

    def accept(self, answers, exchange, sizes, audit):
        self.asked = sorted(exchange.requests)
        held = {1: 4, 2: 6, 3: 0}
        return [
            Reply(client, Payload({}, {"held_out": held[client]}, self.metrics[f"of_{client}"]))
            for client in self.asked
        ], []


def asked(adapter, **metrics):
    method = SimpleNamespace(
        shared=lambda state: adapter, sent_for_evaluation=lambda state: adapter, pools_data=False
    )
    evaluator = Evaluator(method, Rows([1, 0]), {}, {}, (1, 2), 2, 5, "preference")
    clients = Asked(**metrics)
    found = evaluator.evaluate("state", 2, clients, Model(), Costs(), clients)
    return found, clients, [spec.name for spec in clients.exchange_of.reply_schema.metrics]


def test_clients_with_held_out_rows_judge_the_model_that_is_sent():
    own = {"of_1": {"accuracy": 0.5}, "of_2": {"accuracy": 1.0}}
    found, clients, names = asked({"w": torch.ones(1)}, **own)
    assert clients.asked == [1, 2] and not any(name.startswith("common.") for name in names)
    assert found.metrics == {"accuracy": 0.5}
    each = {1: {"accuracy": 0.5, "examples": 4}, 2: {"accuracy": 1.0, "examples": 6}}
    assert found.clients == each


def test_all_clients_judge_their_own_models_on_the_global_rows_too():
    """Means over those that say it; who holds out no rows says nothing of its own."""
    own = {
        "of_1": {"accuracy": 0.5, "common.accuracy": 0.25},
        "of_2": {"accuracy": 1.0, "common.accuracy": 0.75, "common.loss": 2.0},
        "of_3": {},
    }
    found, clients, names = asked(None, **own)
    plain = [name for name in names if not name.startswith("common.")]
    assert clients.asked == [1, 2, 3] and "loss" in plain
    assert names == plain + [f"common.{name}" for name in plain]
    request = decode(clients.exchange_of.requests[1], clients.exchange_of.request_schema)
    assert request.numbers == {"common": 1.0}
    assert found.metrics == {"accuracy": 0.5, "loss": 2.0}
    assert found.clients.keys() == {1, 2} and found.clients[2]["examples"] == 6


@pytest.mark.parametrize(
    ("client", "common", "metrics"),
    [
        (3, 1.0, {"accuracy": 0.75, "common.accuracy": 0.5}),
        (3, 0.0, {"accuracy": 0.75}),
        (4, 1.0, {"common.accuracy": 0.5}),
        (5, 1.0, {}),
    ],
)
def test_a_client_scores_what_it_would_use(client, common, metrics):
    """5 has neither rows of its own nor the global ones."""
    loaded = []
    method = SimpleNamespace(load=lambda own, payload: loaded.append(own.id))
    sets = {3: Rows([1, 0]), 4: Rows([1, 0]), 5: Rows([])}
    evaluator = Evaluator(method, Rows(), sets, {3: Rows([1, 1, 1, 0])}, (3,), 1, 1, "preference")
    own = SimpleNamespace(id=client, model=Model())
    found = evaluator.handler()(own, Payload(numbers={"common": common}))
    assert found.metrics == metrics and loaded == [client]
    assert found.numbers == {"held_out": 4 if client == 3 else 0}
