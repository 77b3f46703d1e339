"""Numbers as people read them."""

import pytest

from fedloom.report.statistics import mean_interval
from fedloom.report.tables import human_bytes, human_count, human_flops, human_seconds


def test_units():
    assert [human_bytes(x) for x in (0, 999, 1000, 13_600_000)] == [
        "0 B",
        "999 B",
        "1 kB",
        "13.6 MB",
    ]
    assert human_flops(2.45e12) == "2.45 TFLOP"
    assert [human_seconds(x) for x in (0.416, 12.3, 185, 7620)] == [
        "0.42 s",
        "12 s",
        "3 min 05 s",
        "2 h 07 min",
    ]
    assert human_count(12345) == "12\u202f345"


def test_interval_by_hand():
    # 1, 2, 3: mean 2, deviation 1, error 1/sqrt(3), t(0.975, 2) = 4.302653
    mean, half = mean_interval([1, 2, 3])
    assert mean == 2 and half == pytest.approx(4.302653 / 3**0.5, rel=1e-6)
    with pytest.raises(ValueError, match="at least two"):
        mean_interval([1])
