"""What intervals say of comparisons whose truth is known, for each question against its own truth."""

import math

import pytest

from sampling import tries
from simulated_comparisons import GRID, POWER, simulate, table


def test_a_handful_of_comparisons():
    """Ten seeds are estimable, two are not; nothing of this is a matter of chance."""
    few = simulate(GRID[0], 3)
    assert (few.estimable, few.seeds_alarms) == (0.0, 0.0) and math.isnan(few.seeds_covered)
    many = simulate(GRID[-1], 3)
    assert many.estimable == 1.0


@pytest.mark.parametrize("count", tries(40, 400))
def test_arms_without_a_difference(count):
    """2,000 comparisons in full, 200 in the slow suite, whose bounds have room for so few."""
    found = [simulate(cell, count) for cell in GRID]
    room = 0.0 if count == 400 else 0.06
    for kind in ("rows_missed", "seeds_alarms"):
        alarms = [getattr(own, kind) for own in found]
        assert sum(alarms) / len(alarms) <= 0.06 + room / 2
        assert max(alarms) <= 0.08 + room, kind
    for own in found:
        assert 1 - own.rows_missed >= 0.93 - room
        assert own.single_covered >= 0.93 - room
        assert own.cell.seeds < 5 or own.seeds_covered >= 0.93 - room
        assert own.estimable == 0 if own.cell.seeds < 5 else own.estimable > 0.95
    print(table(found))


@pytest.mark.full
def test_a_difference_is_found_the_surer_the_more_rows():
    found = {(own.cell.seeds, own.cell.rows): own for own in (simulate(c, 1200) for c in POWER)}
    print(table(found.values()))
    for seeds in (2, 3, 5, 10):
        powers = [found[seeds, rows].rows_power for rows in (50, 200, 500)]
        assert powers == sorted(powers) and powers[-1] > 0.5
    assert found[10, 500].seeds_power > found[5, 500].seeds_power > 0.3
    assert all(own.rows_missed <= 0.08 and own.seeds_alarms <= 0.08 for own in found.values())
