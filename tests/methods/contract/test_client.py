"""A client as handlers see it: shares of a round's work, rows that are drawn, and what privacy refuses."""

from types import SimpleNamespace

import pytest
import torch

from fedloom.errors import PluginError
from fedloom.methods.contract.client import Client, carried_out
from fedloom.training.results import LocalResult
from fedloom.training.settings import Part, TrainingSettings, Work


class Rows(list):
    """Rows of two answers each."""

    tokens = SimpleNamespace(width=2)


def client(rows=20, driver=None, round=2, **training):
    return Client(
        id=1, round=round, model=SimpleNamespace(), initial={}, share=Rows(range(rows)), objective=None,
        training=TrainingSettings(**training), seed=0, noise_seed=0, participations=1.0, rounds=3, store={}, driver=driver,
    )  # fmt: skip


def answered(own, result, **options):
    """What a training asks for, and what comes of it when ``result`` is its outcome."""
    steps = own.training_steps(0.1, **options)
    training = next(steps)
    with pytest.raises(StopIteration) as stop:
        steps.send(result)
    return training, stop.value.value


def test_trainings_of_a_round_share_its_work():
    """10 steps of two parts are 5 and 5; where the first made 3, 7 are left, of 2 a batch 3."""
    own = client(amount_per="round", local_steps=10)
    assert own.work == Work(steps=10) and own.due(Part(0, 2)) == Work(steps=5)
    answered(own, LocalResult(4, 3, 9, 0, {}), part=Part(0, 2))
    assert own.due(Part(1, 2)) == Work(steps=7)
    assert own.due(Part(1, 2), repeats=2) == Work(steps=3)
    later = client(amount_per="round", local_steps=10)  # a request of its own
    assert later.due(Part(1, 2)) == Work(steps=5)
    alone = client(local_steps=10)
    assert alone.due(Part(1, 2)) == Work(steps=10)


@pytest.mark.parametrize(
    ("amount", "left"), [({"local_examples": 40}, 40 - 4 * 2), ({"local_tokens": 60}, 60 - 9)]
)
def test_answers_and_tokens_of_earlier_trainings_are_spent(amount, left):
    """4 rows of two answers each, 9 tokens."""
    own = client(amount_per="round", **amount)
    answered(own, LocalResult(4, 3, 9, 0, {}), part=Part(0, 2))
    (found,) = [n for n in vars(own.due(Part(1, 2))).values() if n is not None]
    assert found == left


def test_a_training_is_of_the_client_and_is_added_up():
    own = client(local_steps=2)
    kept = {"momentum": torch.ones(1)}
    training, result = answered(own, LocalResult(4, 2, 9, 1, {"loss": 1.0}, kept), purpose="alone ")
    assert own.store == {"optimizer alone": kept} and own.last is result
    assert training.options["work"] == Work(steps=2) and training.driver is None
    assert (training.options["repeats"], training.options["state"]) == (1, None)
    training, _ = answered(own, LocalResult(3, 1, 5, 1, {}), purpose="alone ", work=Work(steps=1))
    assert training.options["state"] == kept and training.options["work"] == Work(steps=1)
    assert (own.last.examples, own.last.steps, own.last.tokens) == (7, 3, 14)
    assert list(own.store) == ["optimizer alone"]
    answered(own, LocalResult(3, 1, 5, 1, {}))
    assert own.store.keys() == {"optimizer alone"}


def test_steps_and_losses_that_no_noise_hides_are_refused():
    driver = SimpleNamespace()
    private = client(driver=driver)
    training, _ = answered(private, LocalResult(4, 2, 9, 1, {}))
    assert training.driver is driver
    with pytest.raises(PluginError, match="the method makes steps of its own"):
        next(private.training_steps(0.1, driver=SimpleNamespace()))
    for asked in (private.loss, private.row_losses):
        with pytest.raises(PluginError, match="asks for a loss of rows, which has no noise"):
            asked(2)
    own = SimpleNamespace()
    assert answered(client(), LocalResult(4, 2, 9, 1, {}), driver=own)[0].driver is own


def test_rows_whose_losses_are_told_are_drawn_in_each_round(monkeypatch):
    monkeypatch.setattr("fedloom.methods.contract.client.row_losses", lambda *given: given[-1])
    drawn = client().row_losses(15)
    assert drawn == sorted(set(drawn)) and len(drawn) == 15 and set(drawn) < set(range(20))
    assert drawn == client().row_losses(15) != client(round=3).row_losses(15)
    assert client().row_losses(20) == client().row_losses(21) == list(range(20))


def test_a_training_that_fails_is_told_to_the_handler():
    seen = []

    def handler():
        try:
            yield SimpleNamespace(alone=lambda: 1 // 0)
        except ZeroDivisionError:
            seen.append("told")
            raise

    with pytest.raises(ZeroDivisionError):
        carried_out(handler())
    assert seen == ["told"]

    def two():
        first = yield SimpleNamespace(alone=lambda: 3)
        second = yield SimpleNamespace(alone=lambda: 4)
        return first, second

    assert carried_out(two()) == (3, 4)


def test_defaults_are_of_a_client_with_nothing_of_its_own():
    own = client()
    assert (own.max_length, own.width, own.own_start, own.session) == (0, 0, False, {})
    reply = object()
    assert own.as_read(reply) is reply
