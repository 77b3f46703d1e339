"""Costs of one client in one phase: what adds up, and what does not."""

from dataclasses import asdict

from fedloom.accounting.costs import SERVER, SUMMED, Cost

WHO = {"round": 3, "client": SERVER, "phase": "train"}


def test_nothing_has_been_spent_at_first():
    """The server's costs are under -1, which is no client's id."""
    assert WHO["client"] == -1
    assert asdict(Cost(**WHO)) == {**WHO, **dict.fromkeys(SUMMED, 0), "peak_memory": 0}


def test_costs_add_up_and_of_memory_the_highest_counts():
    own = Cost(**WHO, **dict.fromkeys(SUMMED, 5), peak_memory=70)
    own.add(Cost(**WHO, **dict.fromkeys(SUMMED, 2), peak_memory=60))
    assert asdict(own) == {**WHO, **dict.fromkeys(SUMMED, 7), "peak_memory": 70}
    own.add(Cost(**WHO, peak_memory=80))
    assert own.peak_memory == 80 and own.steps == 7
