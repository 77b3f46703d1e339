"""Tokens a second and time left: by hand, and what was estimated in real runs against what came true."""

from dataclasses import replace

import pytest

import fedloom
from fedloom.accounting.costs import EVALUATE, REFERENCE, Cost
from fedloom.federation.records import RoundRecord
from fedloom.runs.observers import Silent
from fedloom.runs.progress import RoundWork, TimeLeft, tokens_a_second, trained_tokens


def record(round, trained, scored=0.0, judged=0.0, tokens=0):
    """A round in which one client trained, scored its rows and was judged for so many seconds."""
    parts = (("train", trained, tokens), (REFERENCE, scored, 999), (EVALUATE, judged, 0))
    costs = [Cost(round, 0, phase, seconds=own, tokens=n) for phase, own, n in parts]
    return RoundRecord(round, (0,), costs=tuple(costs))


def test_what_is_left_is_told_by_kind_of_work():
    """0.02 s a trained token, 0.01 s a scored one, 3 s to judge, 1 s beside: rounds 3 and 4 train on 300
    tokens, score 50 and are judged once: 6 + 0.5 + 3 + 2 x 1 = 11.5 s."""
    left = TimeLeft(
        [
            RoundWork(0, 0, 1),
            RoundWork(100, 100, 0),
            RoundWork(50, 0, 1),
            RoundWork(200, 50, 0),
            RoundWork(100, 0, 1),
        ]
    )
    left.round_done(record(0, 0, judged=9.0), 9.5)  # slower than later ones: not counted then
    assert left.seconds() is None
    left.round_done(record(1, 2.0, scored=1.0), 4.0)
    left.round_done(record(2, 1.0, judged=3.0), 5.0)
    assert left.seconds() == pytest.approx(11.5)
    left.round_done(record(3, 4.0, scored=0.5), 5.5)
    left.round_done(record(4, 2.0, judged=3.0), 6.0)
    assert left.seconds() == 0


def test_the_start_says_how_long_an_evaluation_takes_until_a_round_is_judged():
    left = TimeLeft([RoundWork(0, 0, 1), RoundWork(10, 0, 0), RoundWork(10, 0, 1)])
    left.round_done(record(0, 0, judged=2.0), 2.0)
    left.round_done(record(1, 1.0), 1.0)
    assert left.seconds() == pytest.approx(3.0)


def test_clients_that_work_side_by_side_are_counted_by_the_clock():
    """Ten clients of 2 s each in a round of 4 s: the rounds left take as long as this one."""
    work = RoundRecord(1, (0,), costs=tuple(Cost(1, c, "train", seconds=2.0) for c in range(10)))
    left = TimeLeft([RoundWork(0), RoundWork(10, 0, 0), RoundWork(5, 0, 0), RoundWork(5, 0, 0)])
    left.round_done(work, 4.0)
    assert left.seconds() == pytest.approx(4.0)


def test_tokens_a_second_are_those_trained_on_in_the_time_that_training_took():
    assert trained_tokens(record(1, 2.0, 5.0, 7.0, tokens=300)) == 300
    assert tokens_a_second(record(1, 2.0, 5.0, 7.0, tokens=300)) == 150
    assert tokens_a_second(RoundRecord(0)) is None


class Records(Silent):
    """What a terminal's estimator is told of a run, its costs in seconds of a machine that does 10^9
    floating-point operations in each: what others on this one do is not in them, so that they are the same
    each time."""

    def __init__(self):
        self.told = {}

    def begin(self, plan):
        self.plan = plan

    def round_done(self, record):
        costs = tuple(replace(cost, seconds=cost.flops / 1e9) for cost in record.costs)
        self.told[record.round] = replace(record, costs=costs)


def estimates(run):
    """What would have been said after each round, and what was true: 0.05 s a round beside its costs."""
    took = {r: 0.05 + sum(cost.seconds for cost in own.costs) for r, own in run.told.items()}
    left, found, last = TimeLeft(run.plan.ahead), {}, max(run.told)
    for round, record in sorted(run.told.items()):
        left.round_done(record, took[round])
        if 3 <= round < last - 1:
            found[round] = left.seconds(), sum(s for r, s in took.items() if r > round)
    return found


UNEQUAL = {
    "partition": {"kind": "size", "sizes": [8, 8, 16, 16, 30, 40, 60, 90, 130], "minimum": 4},
    "data": {"source": "builtin:preferences", "builtin_rows": 500},
    "federation": {"rounds": 14, "clients": 9, "clients_per_round": 3},
    "evaluation": {"every": 4, "samples": 0},
    "training": {"batch_size": 4},
    "output": {"verify": False},
}
"""Clients of 4 to some 200 rows, three a round, of which every fourth is judged."""


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_from_the_third_round_on_what_is_left_is_right_within_a_fifth(seed, tmp_path):
    run = Records()
    table = {**UNEQUAL, "federation": {**UNEQUAL["federation"], "seed": seed}}
    fedloom.run(
        {**table, "output": {"folder": str(tmp_path / "run"), "verify": False}}, observer=run
    )
    found = estimates(run)
    print({round: f"{said:.2f} of {true:.2f} s" for round, (said, true) in found.items()})
    wrong = {r: (said, true) for r, (said, true) in found.items() if abs(said / true - 1) > 0.2}
    assert not wrong
    a_round = [sum(cost.tokens for cost in own.costs) for r, own in run.told.items() if r]
    assert max(a_round) > 2 * min(a_round)  # a mean over rounds would not do
