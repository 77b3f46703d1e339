"""A method that does not keep its contract: one error that names the fault and says what to do."""

import pytest
import torch

from fedloom.errors import PluginError, RoundFailed
from fedloom.federation.contract import begin, fault_of, require_state
from fedloom.federation.presence import Presence
from fedloom.federation.protocol import Cohort
from fedloom.tensors import OnDemand, State

COHORT = Cohort(1, (0,), Presence.of({0: 3}), 0.1)
W = torch.ones(2)


class Given:
    """A method whose round yields what it was given."""

    def __init__(self, *yielded):
        self.yielded = yielded

    def round(self, state, cohort):
        yield from self.yielded
        return state


class Plain:
    def round(self, state, cohort):
        return state


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (Plain(), r"Plain: round\(state, cohort\) returned a State: it must be a generator"),
        (Given(), r"Given: round\(state, cohort\) asked no client: it must yield an Exchange"),
        (Given({"w": W}), "yielded a dict: it must yield an Exchange, such as training_exchange"),
        (Given(None), "yielded nothing: it must yield an Exchange"),
    ],
)
def test_a_round_asks_clients(method, words):
    with pytest.raises(PluginError, match=words):
        begin(method, State({"w": W}), COHORT)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"adapter": {"w": W}}, "'adapter' is a dictionary: put sets of tensors together"),
        ({"steps": 3.0}, r"'steps' is a float: it must be a tensor; torch.tensor\(3.0\) is one"),
        ({0: W}, "0 is no name of a tensor"),
        ({"w": torch.ones(2, requires_grad=True)}, r"'w' is on cpu with gradients: keep tensor.detach"),
        ({"w": torch.ones(2, device="meta")}, "'w' is on meta: keep"),
        ([W], "there is a list where there must be a dictionary"),
        (None, "there is nothing where"),
    ],
)  # fmt: skip
def test_what_is_kept_is_named_tensors(tensors, words):
    with pytest.raises(PluginError, match=words):
        require_state(Plain(), State(tensors), "round(state, cohort)")


def test_a_state_that_can_be_saved():
    counts = torch.tensor([3])
    state = State({"w": W, "counts": counts, "mask": torch.tensor([True])}, {"t": 1})
    assert require_state(Plain(), state, "round") is state
    read_later = State(OnDemand(w=W))
    assert require_state(Plain(), read_later, "round") is read_later
    assert fault_of({}) == fault_of(OnDemand()) == ""


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_state_that_is_not_finite_ends_the_run(value):
    words = "Plain: round made NaN or infinity .* in 'h' of the state: lower training.learning_rate"
    with pytest.raises(RoundFailed, match=words):
        require_state(Plain(), State({"w": W, "h": torch.tensor([0.0, value])}), "round")


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (None, r"returned nothing: it must return State\(tensors\)"),
        ({"w": W}, r"returned a dict: it must return State\(tensors\), with .*join_parts"),
        (State({"w": W}, {"t": W}), "the number 't' is a Tensor"),
        (State({"w": W}, {"t": True}), "the number 't' is a bool"),
    ],
)
def test_a_round_returns_a_state(found, words):
    with pytest.raises(PluginError, match=words):
        require_state(Plain(), found, "round(state, cohort)")
