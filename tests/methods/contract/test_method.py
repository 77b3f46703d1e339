"""What a method does where its class says nothing else."""

from types import SimpleNamespace

import pytest
import torch

from fedloom.aggregation.rules import AggregationSettings
from fedloom.errors import CheckpointError, ModelError
from fedloom.federation.presence import Presence
from fedloom.methods import METHODS
from fedloom.methods.contract.method import Method, ModelSpec, by_place
from fedloom.methods.fedavg import FedAvg, FedAvgSettings
from fedloom.methods.local_only import LocalOnly, LocalOnlySettings
from fedloom.tensors import State

ADAPTER = {"w": torch.zeros(3), "v": torch.zeros(2, 2)}


def server(stacked=None, **rule):
    model = SimpleNamespace(stacked=stacked)
    return SimpleNamespace(model=model, aggregation=AggregationSettings(**rule), seed=0)


def test_the_adapter_travels_both_ways_and_is_all_of_the_state():
    method = FedAvg(FedAvgSettings())
    state = method.initial_state(ADAPTER)
    form = method.traffic(ADAPTER)
    assert (form.down, form.up) == (28, 28)
    for found in (state.tensors, method.shared(state), method.sent_to_unseen(state)):
        assert found is ADAPTER
    for shapes in (method.sent_shapes, method.sent_in_even_rounds, method.received_shapes):
        assert shapes(ADAPTER) is ADAPTER
    assert method.ensemble(state) == {} and method.privacy_statement() is None
    spec = ModelSpec("backbone", 4)
    assert method.server_model(spec) is spec
    assert method.client_model(SimpleNamespace(whole="whole")) == "whole"
    assert method.compute(SimpleNamespace(own_rows=lambda: 7.0)) == 7.0
    assert list(method.variants(None, None)) == []
    own = LocalOnly(LocalOnlySettings())
    assert own.sent_for_evaluation(State(ADAPTER)) is own.sent_to_unseen(State(ADAPTER)) is None


@pytest.mark.parametrize("call", [lambda m: m.round(None, None), lambda m: m.handlers()])
def test_what_a_method_must_define_is_named(call):
    with pytest.raises(TypeError, match="Bare must define"):
        call(type("Bare", (Method,), {})({}))


def test_means_alone_are_needed_where_no_rule_compares_answers():
    def alone(name, private=None, **rule):
        settings, kind = METHODS[name]
        method = kind(settings())
        method.aggregation, method.private = AggregationSettings(**rule), private
        return method.means_alone

    assert alone("fedavg")
    assert not alone("fedavg", rule="median")
    assert not alone("fedavg", private=object())
    assert not alone("appa")


def test_rules_of_products_need_linear_layers():
    method = FedAvg(FedAvgSettings())
    method.setup(server(stacked="experts"))
    assert method.aggregation.rule == "mean"
    method.setup(server(rule="knots"))
    with pytest.raises(ModelError, match="experts has factors for a stack"):
        method.setup(server(stacked="experts", rule="knots"))


def test_what_was_kept_by_place_is_that_of_the_clients_in_order():
    presence = Presence.of({3: 1, 7: 1})
    found = by_place(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), 1, presence)
    assert {client: own.tolist() for client, own in found.items()} == {3: [1, 3, 5], 7: [2, 4, 6]}
    with pytest.raises(
        CheckpointError, match=r"knows of 3 clients by their place.*and 2 take part"
    ):
        by_place(torch.zeros(3, 2), 0, presence)
