"""Sizes as people write them, and how long a round takes on a link."""

import pytest

from fedloom.accounting.network import Link
from fedloom.accounting.quantities import parse_quantity
from fedloom.accounting.traffic import Sent


@pytest.mark.parametrize(
    ("text", "unit", "value"),
    [
        ("10Mbit", "bit", 10e6),
        ("1.5 Gbit/s", "bit", 1.5e9),
        ("20Mbps", "bit", 20e6),
        ("8GB", "B", 8e9),
        ("8GiB", "B", 8 * 1024**3),
        ("512B", "B", 512),
        ("0.5 kbit", "bit", 500),
        ("0.25s", "s", 0.25),
        ("3us", "s", 3e-6),
        ("40ms", "s", 0.04),
        ("2s", "s", 2),
        ("5TFLOP", "FLOP", 5e12),
        ("2PFLOPS", "FLOP", 2e15),
        ("3kbps", "bit", 3000),
        ("100 GFLOP/s", "FLOP", 1e11),
    ],
)
def test_quantities(text, unit, value):
    assert parse_quantity(text, unit) == pytest.approx(value)


@pytest.mark.parametrize(
    ("text", "unit"),
    [
        ("fast", "bit"),
        ("10", "bit"),
        ("10MB", "bit"),
        ("-1s", "s"),
        ("0ms", "s"),
        ("1.2.3GB", "B"),
        ("", "B"),
    ],
)
def test_what_is_none_is_said_with_an_example(text, unit):
    with pytest.raises(ValueError, match=r"is not a quantity above 0 in .*; write it like \d"):
        parse_quantity(text, unit)


def test_a_round_by_hand():
    link = Link(uplink=8e6, downlink=80e6, latency=0.1, speed=1e9)
    # 1 MB up at 1 MB/s, 2 MB down at 10 MB/s, 3 round trips of 0.1 s, 5 GFLOP at 1 GFLOP/s
    assert link.seconds(Sent(down=2_000_000, up=1_000_000, exchanges=3), 5e9) == pytest.approx(6.5)
