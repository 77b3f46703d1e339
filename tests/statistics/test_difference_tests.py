"""Adjusted p values, and tests of groups, by hand."""

import pytest

from fedloom.statistics.difference_tests import group_test, holm


def test_holm():
    """0.01 x 3, 0.03 x 2, 0.04 x 1 made no smaller than what comes before it."""
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([]) == [] and holm([0.9, 0.8]) == [1.0, 1.0]


def table(count, **pairs):
    """Return a symmetric table of the values of pairs, such as ``p01=3``, 0 elsewhere."""
    values = [[0.0] * count for _ in range(count)]
    for name, value in pairs.items():
        one, other = int(name[1]), int(name[2])
        values[one][other] = values[other][one] = value
    return values


def test_groups_by_hand():
    """Pairings of four: 01 with 23 has mean 4, 02 with 13 3.5, 03 with 12 1.5; each in two ways."""
    values = table(4, p01=3.0, p23=5.0, p02=3.0, p13=4.0, p03=1.0, p12=2.0)
    found = group_test(values, ["a", "a", "b", "b"])
    assert (found.same, found.other, found.expected) == (4.0, 2.5, 3.0)
    assert found.deviation == pytest.approx((3.5 / 3) ** 0.5)
    assert (found.p, found.ways) == (pytest.approx(1 / 3), 6)
    assert group_test(values, ["a", "b", "b", "a"]).p == 1.0  # all are as large as the smallest


@pytest.mark.parametrize("groups", ["aaaa", "abcd"])
def test_pairs_within_and_across_are_needed(groups):
    with pytest.raises(ValueError, match="within them and pairs across"):
        group_test(table(4, p01=1.0), list(groups))


def test_from_nine_members_on_ways_are_drawn():
    """Of eight all ways to name one that is apart; of nine a sample, about the mean of all pairs."""
    assert group_test(table(8, p01=1.0), [*"aaaaaaa", "b"]).ways == 8
    found = group_test(table(9, p01=1.0, p78=2.0), list("aaaabbbbb"))
    assert found.ways == 5000
    assert found.expected == pytest.approx(3 / 36, abs=5 * found.deviation / 5000**0.5)
