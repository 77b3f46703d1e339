"""What a round notes of averaging LoRA's factors apart, and by what clients weigh."""

from types import SimpleNamespace

import pytest
import torch

from fedloom.aggregation.rules import AggregationSettings
from fedloom.federation.protocol import SummedReplies
from fedloom.methods.contract import averaging
from fedloom.methods.contract.averaging import note_averaging_error, weights_of
from fedloom.methods.fedavg import FedAvg, FedAvgSettings
from fedloom.wire.messages import Payload, Reply

A, B = "x.lora_A.weight", "x.lora_B.weight"


def replies(*rows, **tensors):
    """Adapters whose factors are the numbers 1, 2 and so on."""
    own = [{A: torch.full((1, 2), k), B: torch.full((2, 1), k)} for k in (1.0, 2.0)]
    return [
        Reply(k, Payload(tensors or own[k], {"examples": count})) for k, count in enumerate(rows)
    ]


def noted(own, **options):
    cohort = SimpleNamespace(notes={})
    note_averaging_error(own, cohort, **options)
    return cohort.notes


def test_clients_weigh_by_rows_or_alike():
    assert weights_of(replies(2.0, 5.0), by_rows=True) == [2.0, 5.0]
    assert weights_of(replies(2.0, 5.0), by_rows=False) == [1.0, 1.0]


def test_the_error_is_that_of_the_mean_of_products():
    """Products 1 and 4, factors 1 and 2. Alike: 2.5, and 1.5^2 = 2.25. By 1 and 3 rows: 3.25, 1.75^2."""
    assert noted(replies(1.0, 3.0), by_rows=False)["aggregation_error"] == pytest.approx(0.1)
    found = noted(replies(1.0, 3.0))["aggregation_error"]
    assert found == pytest.approx((3.25 - 1.75**2) / 3.25, abs=1e-6)


@pytest.mark.parametrize(("flops", "said"), [(1e11, True), (1.01e11, False)])
def test_it_is_not_computed_where_that_takes_more_than_two_seconds(monkeypatch, flops, said):
    monkeypatch.setattr(averaging, "error_flops", lambda adapters: flops)
    assert bool(noted(replies(1.0, 3.0))) == said


def test_nothing_is_noted_of_sums_and_of_adapters_without_factors():
    assert noted(replies(1.0, 3.0, w=torch.ones(1))) == {}
    assert noted(SummedReplies.__new__(SummedReplies)) == {}


def test_a_method_notes_it_where_it_asks_for_that_alone():
    method = FedAvg(FedAvgSettings())
    method.aggregation = AggregationSettings()
    for options, keys in (({}, []), ({"noted": True}, ["aggregation_error"])):
        cohort = SimpleNamespace(notes={})
        method.averaged(replies(1.0, 3.0), cohort, {}, **options)
        assert list(cohort.notes) == keys
