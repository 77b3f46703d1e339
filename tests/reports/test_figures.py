"""Charts: what lies on top of each other is drawn so that all of it shows, and everybody is named."""

import re

import pytest

from fedloom.reports import figures
from fedloom.reports.figures import MANY_CLIENTS, _apart, _grouped, _places, _sizes


def test_lines_that_coincide_have_dashes_that_take_turns():
    """The range is 0 to 1, so that lines within .01 of each other on two points in a row coincide."""
    rounds = [0, 1, 2]
    one, near = (rounds, [0.0, 0.5, 1.0]), (rounds, [0.0, 0.505, 0.2])
    crossing, apart = (rounds, [1.0, 0.5, 0.0]), (rounds, [0.3, 0.3, 0.3])
    assert _places([one, crossing, apart]) == [(0, 1)] * 3
    assert _places([one, crossing, near]) == [(0, 2), (0, 1), (1, 2)]
    assert _places([one, one, one]) == [(0, 3), (1, 3), (2, 3)]
    assert _places([([1], [0.5]), ([1], [0.5])]) == [(0, 2), (1, 2)]
    assert _places([one, ([], [])]) == [(0, 1), (0, 1)] and _places([]) == []
    drawn = figures.line_chart({"down": one, "up": one}, "round", "MB")
    assert (
        len(set(re.findall(r"stroke-dasharray: [\d. ,]+; stroke-dashoffset: [\d.]+", drawn))) == 2
    )


def test_a_marker_below_others_is_larger():
    assert _sizes([(0, 0), (1, 1), (0, 0), (0.005, 0)], 8) == [16, 8, 12, 8]


def test_dots_of_a_row_are_moved_apart_where_they_would_hide():
    assert _apart([0.5, 0.1, 0.5, 0.5], 1.0) == pytest.approx([0, 0, 0.16, -0.16], abs=1e-12)


def record(clients, values):
    """Client i holds i + 1 rows of value i, and one of the next."""
    names = [f"value {number}" for number in range(values)]
    own = [
        {"client": i, "counts": {names[i % values]: i + 1, names[(i + 1) % values]: 1}}
        for i in range(clients)
    ]
    return {"column": "topic", "values": names, "clients": own}


def words(svg):
    return set(re.findall(r">([^<>]+)</text>", svg))


@pytest.mark.parametrize(("clients", "values"), [(3, 2), (20, 30), (40, 9)])
def test_every_client_and_value_is_named(clients, values):
    drawn = words(figures.partition_svg(record(clients, values)))
    assert {f"client {i}" for i in range(clients)} <= drawn
    assert {f"value {i}" for i in range(values)} <= drawn


def test_many_clients_are_put_together_by_what_they_hold_most_of():
    drawn = words(figures.partition_svg(record(200, 3)))
    assert {"67 clients, mostly value 0", "66 clients, mostly value 2", "value 1"} <= drawn
    assert "rows, mean of a client" in drawn
    counts = [[4, 0]] * 30 + [[2, 2]] * 10 + [[0, 8]]
    table, titles = _grouped([], counts, ["a", "b"])
    assert titles == ["40 clients, mostly a", "1 client, mostly b"]
    assert table == [[3.5, 0.5], [0, 8]] and len(counts) > MANY_CLIENTS


def test_many_clients_without_a_column_are_counted_by_their_rows():
    own = [{"client": i, "counts": {"rows": 1 + i % 7}} for i in range(200)]
    drawn = words(figures.partition_svg({"column": None, "values": ["rows"], "clients": own}))
    assert {"rows", "clients"} <= drawn


def test_values_beyond_those_that_are_named_are_one_row():
    assert "10 rarer values" in words(figures.partition_svg(record(70, 70)))


def test_a_picture_for_a_file_has_its_colours_in_it():
    page, file = (figures.partition_svg(record(3, 2), standalone=own) for own in (False, True))
    assert "var(--c0, #0072B2)" in page and "currentColor" in page
    assert "var(" not in file and "currentColor" not in file and "#0072B2" in file
