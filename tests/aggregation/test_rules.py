"""Rules by name: each is known, and no other."""

from typing import get_args

import numpy as np
import pytest
import torch

from fedloom.aggregation.means import weighted_mean
from fedloom.aggregation.merging import merged
from fedloom.aggregation.rules import AggregationSettings, combined

START = {"w": torch.zeros(3)}
UPDATES = [{"w": torch.arange(3.0) + i} for i in range(5)]
WEIGHTS = [1.0, 2.0, 3.0, 4.0, 5.0]


@pytest.mark.parametrize("rule", get_args(AggregationSettings.model_fields["rule"].annotation))
def test_every_rule_that_can_be_set_is_known(rule):
    own = AggregationSettings(rule=rule).merging
    if own is not None:  # one of model merging, which needs random numbers too
        assert merged(UPDATES, WEIGHTS, START, own, np.random.default_rng)[0]["w"].shape == (3,)
        return
    assert combined(rule, UPDATES, WEIGHTS, START)["w"].shape == (3,)


def test_the_mean():
    found = combined("mean", UPDATES, WEIGHTS, START)["w"]
    assert torch.equal(found, weighted_mean(UPDATES, WEIGHTS)["w"])


def test_another_is_not_taken_for_the_mean():
    with pytest.raises(ValueError, match="'fedavg' is not a rule"):
        combined("fedavg", UPDATES, WEIGHTS, START)


def test_how_many_clients_a_rule_needs_is_said():
    own = AggregationSettings(rule="trimmed_mean", bad=2)
    assert own.contradictions(5) == []
    (found,) = own.contradictions(4)
    assert found.endswith("aggregation.bad = 2 needs 5 clients in a round, there are 4")
    (found,) = AggregationSettings(rule="krum", bad=1).contradictions(4)
    assert found.endswith("needs 5 clients in a round, there are 4")
