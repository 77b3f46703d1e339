"""Numbers as people read them."""

from fedloom.accounting.quantities import human_bytes, human_count, human_flops, human_seconds


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
