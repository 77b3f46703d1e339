"""The best round and early stopping by hand: ties, thresholds, rounds without a number, going on."""

import math

import pytest
import torch

from fedloom.federation.best_round import BestRound
from fedloom.tensors import State


def state(number):
    return State({"x": torch.tensor([float(number)])})


def seen(best, values):
    """Let it see values of rounds 1, 2, ... until the run is over; return the last round."""
    for round, value in enumerate(values, 1):
        best.see(round, None if value is None else {"m": value}, state(round))
        if best.over:
            return round
    return len(values)


@pytest.mark.parametrize(
    ("values", "options", "kept", "last"),
    [
        ([3.0, 2.0, 2.5, 2.2, 1.0], {"patience": 2}, 2, 4),
        ([3.0, 2.0, 2.5, 1.9, 2.0, 1.8], {"patience": 2}, 6, 6),  # not in a row
        ([3.0, 2.0, 2.0], {}, 2, 3),  # of equal ones the first, and no patience: all rounds
        ([3.0, 2.95, 2.9, 2.85], {"patience": 2, "threshold": 0.1}, 3, 3),  # small gains are kept
        (
            [3.0, None, None, 3.5],
            {"patience": 1},
            1,
            4,
        ),  # rounds without an evaluation do not count
        ([math.nan, 3.0, math.nan, math.nan], {"patience": 2}, 2, 4),
        ([math.nan, math.nan], {"patience": 2}, 1, 2),  # none was a number: the first
        ([0.5, 0.7, 0.6], {"higher_is_better": True, "patience": 1}, 2, 3),
    ],
)
def test_by_hand(values, options, kept, last):
    best = BestRound("m", options.pop("higher_is_better", False), **options)
    best.see(0, {"m": -100.0 if not best.higher_is_better else 100.0}, state(0))  # no candidate
    assert seen(best, values) == last
    assert best.round == kept and best.state.tensors["x"].item() == kept


def test_it_goes_on_from_what_was_saved():
    values = [3.0, 2.0, 2.5, 2.2, 1.0]
    for stop in range(1, 4):
        first, second = BestRound("m", False, 2), BestRound("m", False, 2)
        seen(first, values[:stop])
        second.restore(first.saved(), first.state)
        for round in range(stop + 1, 5):
            second.see(round, {"m": values[round - 1]}, state(round))
        assert (second.round, second.over, second.value) == (2, True, 2.0)


def test_what_the_summary_says():
    best = BestRound("loss", False, 2, 0.01)
    for round, value in enumerate((3.0, 2.0, 2.5, 2.2), 1):
        best.see(round, {"loss": value}, state(round))
    assert best.record(4)["text"] == (
        "The adapter is that of round 2, the best by held-out loss (2.0000); the run ended after round 4, "
        "as the last 2 were not better by more than 0.01."
    )
