"""What a method's hooks return before anything is trained: each fault is one error that names it."""

import pytest
import torch

from fedloom.accounting.traffic import ParameterTraffic
from fedloom.errors import PluginError
from fedloom.methods.contract.method import Method
from fedloom.methods.contract.soundness import first_state, sound_handlers
from fedloom.tensors import State, join_parts, part_of

ADAPTER = {"a": torch.ones(2, 3), "b": torch.zeros(4)}


class Parts(Method):
    """Keeps the adapter and one more set of tensors."""

    def initial_state(self, adapter):
        return State(join_parts(adapter=adapter, h={n: 0 * t for n, t in adapter.items()}))

    def shared(self, state):
        return part_of(state.tensors, "adapter")


class Whole(Parts):
    shared = Method.shared


class Lost(Parts):
    def shared(self, state):
        return {}


class LostOne(Parts):
    def shared(self, state):
        return {"b": ADAPTER["b"]}


class Turned(Parts):
    def shared(self, state):
        return {n: t.T if t.dim() > 1 else t for n, t in super().shared(state).items()}


class Listed(Parts):
    def shared(self, state):
        return list(state.tensors)


class Counted(Parts):
    def traffic(self, adapter):
        return 12


class Bare(Parts):
    def initial_state(self, adapter):
        return adapter


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Whole, r"shared\(state\) returns the whole state, in which 'a' is not: define shared"),
        (Lost, r"shared\(state\) lacks 'a' and 1 more: it must return every tensor"),
        (LostOne, r"shared\(state\) lacks 'a': it must return every tensor"),
        (Turned, r"shared\(state\) has 'a' with shape \(3, 2\): the adapter's is \(2, 3\)"),
        (Listed, r"shared\(state\) returned a list"),
        (Counted, r"traffic\(adapter\) returned an int: .*ParameterTraffic\(down, up\)"),
        (Bare, r"test_soundness:Bare: initial_state\(adapter\) returned a dict: .*State\(tensors\)"),
    ],
)  # fmt: skip
def test_what_is_wrong_before_the_first_round(kind, words):
    with pytest.raises(PluginError, match=words):
        first_state(kind({}), ADAPTER)


def test_a_sound_method_keeps_its_state():
    state = first_state(Parts({}), ADAPTER)
    assert list(state.tensors) == ["adapter/a", "adapter/b", "h/a", "h/b"]
    assert first_state(Method({}), ADAPTER).tensors == ADAPTER
    assert Parts({}).traffic(ADAPTER) == ParameterTraffic(40, 40)


@pytest.mark.parametrize(
    ("handlers", "words"),
    [
        ({"train": None}, "must return a dictionary from the name of each action to its function"),
        ([print], "must return a dictionary"),
        ({"train": print, "evaluate": print}, "names 'evaluate', an action that every method has"),
    ],
)
def test_handlers_are_functions_by_action(handlers, words):
    method = Parts({})
    method.handlers = lambda: handlers
    with pytest.raises(PluginError, match=words):
        sound_handlers(method, ("evaluate", "join"))


def test_a_method_s_own_handlers():
    method = Parts({})
    method.handlers = lambda: {"train": print}
    assert sound_handlers(method, ("evaluate", "join")) == {"train": print}
