"""Robust rules against Flower's own on random updates, whose order of summation differs alone."""

import numpy as np
import pytest
import torch
from flwr.server.strategy import aggregate as flower

from fedloom.aggregation.robust import coordinate_median, krum, multi_krum, trimmed_mean

CLIENTS, BAD = 10, 2
RULES = {
    "median": (coordinate_median, flower.aggregate_median),
    "trimmed mean": (
        lambda own: trimmed_mean(own, BAD),
        lambda rows: flower.aggregate_trimmed_avg(rows, BAD / CLIENTS),
    ),
    "krum": (lambda own: krum(own, BAD), lambda rows: flower.aggregate_krum(rows, BAD, 0)),
    "multi-krum": (
        lambda own: multi_krum(own, BAD),
        lambda rows: flower.aggregate_krum(rows, BAD, CLIENTS - BAD),
    ),
}


@pytest.mark.parametrize("clients", [CLIENTS, CLIENTS + 1], ids=["even", "odd"])
@pytest.mark.parametrize("rule", RULES)
def test_robust_rules_against_flower(rule, clients):
    if clients != CLIENTS and rule in ("trimmed mean", "multi-krum"):
        pytest.skip("the oracle's share is of ten clients")
    rng = np.random.default_rng(4)
    drawn = [[rng.normal(size=(3, 4)), rng.normal(size=5)] for _ in range(clients)]
    drawn[3] = [100 * part for part in drawn[3]]
    own, theirs = RULES[rule]
    found = own([{"a": torch.from_numpy(a), "b": torch.from_numpy(b)} for a, b in drawn])
    expected = theirs([(arrays, 1) for arrays in drawn])
    for name, array in zip("ab", expected, strict=True):
        np.testing.assert_allclose(found[name].numpy(), array, rtol=1e-12, atol=1e-12)
