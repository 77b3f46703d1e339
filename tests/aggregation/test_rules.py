"""Rules by name: each is known, and no other."""

from typing import get_args

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from fedloom.aggregation.means import weighted_mean
from fedloom.aggregation.merging import merged
from fedloom.aggregation.robust import (
    clipped_mean,
    coordinate_median,
    geometric_median,
    krum,
    multi_krum,
    trimmed_mean,
)
from fedloom.aggregation.rules import NEEDED, AggregationSettings, combined

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


FAR = [{"w": torch.tensor([float(i), i * i, (-1.0) ** i])} for i in (0, 1, 2, 3, 9)]


@pytest.mark.parametrize(
    ("rule", "direct"),
    [
        ("median", lambda: coordinate_median(FAR)),
        ("trimmed_mean", lambda: trimmed_mean(FAR, 1)),
        ("krum", lambda: krum(FAR, 1)),
        ("multi_krum", lambda: multi_krum(FAR, 1)),
        ("geometric_median", lambda: geometric_median(FAR, WEIGHTS)),
        ("clipped_mean", lambda: clipped_mean(FAR, WEIGHTS, START, 2.0)),
    ],
)
def test_a_rule_is_the_one_of_its_name(rule, direct):
    found = combined(rule, FAR, WEIGHTS, START, 1, 2.0)["w"]
    assert torch.equal(found, direct()["w"])
    assert not torch.allclose(found, weighted_mean(FAR, WEIGHTS)["w"])


def test_without_more_nobody_is_bad_and_nothing_is_cut():
    plain = weighted_mean(FAR, [1.0] * 5)["w"]
    assert torch.allclose(combined("trimmed_mean", FAR, WEIGHTS, START)["w"], plain)
    found = combined("clipped_mean", FAR, WEIGHTS, START)["w"]
    assert torch.equal(found, weighted_mean(FAR, WEIGHTS)["w"])


@pytest.mark.parametrize(("rule", "more"), [("trimmed_mean", 1), ("krum", 3), ("multi_krum", 3)])
@pytest.mark.parametrize("bad", [0, 2])
def test_twice_as_many_clients_as_may_be_bad_and_some_more(rule, more, bad):
    own = AggregationSettings(rule=rule, bad=bad)
    assert own.contradictions(2 * bad + more) == []
    assert len(own.contradictions(2 * bad + more - 1)) == 1
    combined(rule, UPDATES * 2, WEIGHTS * 2, START, bad)
    with pytest.raises(ValueError, match=f"it needs {2 * bad + more}"):
        combined(rule, (UPDATES * 2)[: 2 * bad + more - 1], WEIGHTS, START, bad)
    assert NEEDED[rule] == more


@pytest.mark.parametrize(
    ("own", "words"),
    [
        ({}, None),
        ({"bad": 1}, "aggregation.bad is a setting of"),
        ({"rule": "clipped_mean"}, "go together"),
        ({"rule": "clipped_mean", "max_norm": 0.5}, None),
        ({"rule": "median", "max_norm": 0.5}, "go together"),
    ],
)
def test_settings_that_go_with_a_rule(own, words):
    found = AggregationSettings(**own).contradictions(9)
    assert [words in text for text in found] == ([] if words is None else [True])


@pytest.mark.parametrize(
    ("name", "allowed", "refused"),
    [
        ("bad", (0, 7), (-1,)),
        ("max_norm", (0.001,), (0.0,)),
        ("density", (0.001, 1.0), (0.0, 1.001)),
        ("scale", (0.001, 100.0), (0.0, 100.5)),
    ],
)
def test_bounds_of_settings(name, allowed, refused):
    for value in allowed:
        assert getattr(AggregationSettings(**{name: value}), name) == value
    for value in refused:
        with pytest.raises(ValidationError):
            AggregationSettings(**{name: value})


def test_the_mean_of_factors_without_a_rule_and_products_where_it_asks_for_them():
    own = AggregationSettings()
    assert (own.rule, own.bad, own.scale, own.space) == ("mean", 0, 1.0, "factors")
    for rule, space, expected in (
        ("mean", "product", False),
        ("ties", "factors", False),
        ("ties", "product", True),
        ("knots", "factors", True),
    ):
        assert AggregationSettings(rule=rule, space=space).of_products is expected
