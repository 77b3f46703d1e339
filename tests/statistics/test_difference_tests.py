"""Adjusted p values by hand."""

import pytest

from fedloom.statistics.difference_tests import holm


def test_holm():
    """0.01 x 3, 0.03 x 2, 0.04 x 1 made no smaller than what comes before it."""
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([]) == [] and holm([0.9, 0.8]) == [1.0, 1.0]
