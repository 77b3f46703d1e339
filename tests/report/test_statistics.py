"""Intervals and paired tests by hand."""

import pytest

from fedloom.report.statistics import holm, mean_interval, paired_test


def test_the_interval_of_three_values():
    """1, 2, 3: standard error 1 / sqrt(3), t with two degrees of freedom 4.302653."""
    mean, half = mean_interval([1.0, 2.0, 3.0])
    assert (mean, half) == pytest.approx((2.0, 4.302653 / 3**0.5), abs=1e-5)
    with pytest.raises(ValueError, match="at least two"):
        mean_interval([1.0])


def test_a_paired_test():
    """Differences 1, 2, 3: t = 2 sqrt(3) = 3.4641 with two degrees of freedom, p = 0.07418."""
    found = paired_test([0.0, 0.0, 0.0], [1.0, 2.0, 3.0])
    assert (found.units, found.difference) == (3, 2.0)
    assert found.p == pytest.approx(0.0741799, abs=1e-6)


def test_what_has_no_spread():
    assert paired_test([1.0], [2.0]).p is None
    assert paired_test([1.0, 2.0], [1.0, 2.0]).p == 1.0
    assert paired_test([1.0, 2.0], [2.0, 3.0]).p == 0.0
    assert paired_test([0.1, 0.2], [0.4, 0.5]).half == 0.0  # alike up to rounding
    with pytest.raises(ValueError, match="at least one"):
        paired_test([], [])
    with pytest.raises(ValueError, match="zip"):
        paired_test([1.0], [])


def test_holm():
    """0.01 x 3, 0.03 x 2, 0.04 x 1 made no smaller than what comes before it."""
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([]) == [] and holm([0.9, 0.8]) == [1.0, 1.0]
