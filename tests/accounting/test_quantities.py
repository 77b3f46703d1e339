"""Numbers as people read them."""

import ast
from pathlib import Path

import pytest

import fedloom
from fedloom.accounting.quantities import (
    human_bytes,
    human_count,
    human_flops,
    human_number,
    human_seconds,
)


def test_units():
    assert [human_bytes(x) for x in (0, 999, 1000, 13_600_000)] == [
        "0 B",
        "999 B",
        "1 kB",
        "13.6 MB",
    ]
    assert human_flops(2.45e12) == "2.45 TFLOP"
    assert human_bytes(1e12) == "1 TB" and human_bytes(2e16) == "2e+04 TB"
    assert human_flops(3e18) == "3 EFLOP" and human_bytes(-2500) == "-2.5 kB"
    assert [human_seconds(x) for x in (0.416, 12.3, 185, 7620)] == [
        "0.42 s",
        "12 s",
        "3 min 05 s",
        "2 h 07 min",
    ]
    ends = {9.99: "9.99 s", 10: "10 s", 59: "59 s", 60: "1 min 00 s", 3599: "59 min 59 s"}
    assert {x: human_seconds(x) for x in (*ends, 3600)} == {**ends, 3600: "1 h 00 min"}
    assert human_count(12345) == "12\u202f345"


def test_counts_with_a_sign():
    assert [human_count(n, signed=True) for n in (20, -4000)] == ["+20", "-4\u202f000"]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (12, "12"),
        (12345.0, "12\u202f345"),
        (1720.5, "1\u202f720"),
        (-1000.4, "-1\u202f000"),
        (1e15 + 0.5, "1e+15"),
        (287.8333, "287.8"),
        (0.123456, "0.1235"),
        (0, "0"),
        (1e20, "100\u202f000\u202f000\u202f000\u202f000\u202f000\u202f000"),
        (1.5e-7, "1.5e-07"),
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
    ],
)
def test_numbers_whole_or_not(value, shown):
    assert human_number(value) == shown


OTHER = ("display/untrusted_text.py",)
"""Below accounting's layer, in errors that are cut off."""


def test_thousands_are_written_in_one_way():
    """No f-string of the package has thousands of its own; ``human_count`` writes them."""
    root = Path(fedloom.__file__).parent
    found = []
    for file in root.rglob("*.py"):
        name = file.relative_to(root).as_posix()
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.FormattedValue) and node.format_spec is not None:
                spec = ast.unparse(node.format_spec)
                found += [(name, node.lineno)] if "," in spec else []
    assert {name for name, _ in found} == {"accounting/quantities.py", *OTHER}, found
