"""What an evaluation says where all rows are at the server, and where it has no model."""

from contextlib import contextmanager
from types import SimpleNamespace

from fedloom.federation.records import Evaluation
from fedloom.methods.contract.federated_evaluation import Evaluator


class Rows(list):
    """Held-out rows that any model gets right for the share that is said."""

    sample = "which rows are right"

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
