"""Each figure has its numbers in it, which are those that were drawn."""

import html
import json
import re
from xml.etree import ElementTree

import pytest

from fedloom.reports import figures
from fedloom.reports.figure_data import embedded, line, table


def numbers(picture):
    ElementTree.fromstring(picture)  # it is one whole element
    (text,) = re.findall(r'<metadata data-numbers="">(.*?)</metadata>', picture)
    return json.loads(html.unescape(text))


def test_a_line_chart_has_its_lines_its_intervals_and_its_axes():
    lines = {"a": ([0, 1], [0.5, 0.61234567]), "b": ([1], [float("nan")])}
    own = numbers(
        figures.line_chart(
            lines,
            "round",
            "loss (nats)",
            band=([0, 1], [0.1, 0.2], [0.3, 0.4]),
            band_label="clients",
            bands={"a": ([1], [0.5], [0.7])},
        )
    )
    assert own["x"] == {"label": "round"} and own["y"] == {"label": "loss (nats)"}
    assert own["lines"] == [
        {
            "name": "a",
            "x": [0, 1],
            "y": [0.5, 0.612346],
            "low": [None, 0.5],
            "high": [None, 0.7],
            "colour": 0,
        },
        {"name": "b", "x": [1], "y": [None], "colour": 1},
        {
            "name": "clients",
            "x": [0, 1],
            "y": None,
            "low": [0.1, 0.2],
            "high": [0.3, 0.4],
            "colour": 7,
        },
    ]


def test_points_have_their_intervals_and_x_is_scaled_as_it_is_drawn():
    points = {"few": (1.0, 0.5), "many": (100.0, 0.9)}
    own = numbers(figures.scatter_chart(points, "MB", "accuracy", {"few": (0.4, 0.6)}))
    assert own["x"] == {"label": "MB", "log": True}
    assert [one["low"] for one in own["lines"]] == [[0.4], [None]]
    alike = numbers(figures.scatter_chart({"a": (10.0, 1.0), "b": (10.1, 1.0)}, "MB", "y"))
    assert alike["x"]["limits"] == [9, 11.11]
    grid = [("dpo", "fedavg", 1.0, 0.5), ("kto", "fedavg", 2.0, 0.6)]
    own = numbers(figures.grid_scatter(grid, "MB", "accuracy", [(0.4, 0.6), None]))
    assert [(one["name"], one["colour"]) for one in own["lines"]] == [
        ("dpo, fedavg", 0),
        ("kto, fedavg", 1),
    ]
    front = [("dpo", "fedavg", 1.0, 0.5, True), ("dpo", "ditto", 2.0, 0.4, False)]
    own = numbers(figures.pareto_scatter(front, "MB", "accuracy"))
    assert [one["name"] for one in own["lines"]] == ["fedavg (on the front)", "ditto"]


def test_rows_with_names_have_them_in_the_order_that_is_drawn():
    own = numbers(
        figures.before_after_chart({"7": 0.5, "8": 0.5}, {"7": 0.9, "8": 0.6}, "accuracy")
    )
    assert own["y"]["names"] == ["client 8", "client 7"]
    assert [one["x"] for one in own["lines"]] == [[0.5, 0.5], [0.6, 0.9]]
    own = numbers(figures.strip_chart({"a": ([0.1, 0.3], 0.2), "b": ([0.5], 0.5)}, "accuracy"))
    assert own["y"]["names"] == ["b", "a"] and own["lines"][1]["x"] == [0.5, 0.2]
    own = numbers(figures.interval_chart({"a": (0.5, 0.4, 0.6)}, "difference"))
    assert own["lines"][0] | {"across": True} == own["lines"][0]


def test_what_is_not_drawn_again_is_a_table():
    own = numbers(
        figures.matrix_chart([[1.0, 0.5], [0.5, 1.0]], ["0", "1"], "cosine", diagonal=False)
    )
    assert own["table"] == {
        "columns": ["client", "0", "1"],
        "rows": [["0", None, 0.5], ["1", 0.5, None]],
    }
    record = {
        "clients": [{"client": 3, "counts": {"a": 2}}, {"client": 5, "counts": {"a": 1, "b": 4}}],
        "values": ["a", "b"],
        "column": "topic",
    }
    own = numbers(figures.partition_svg(record))["table"]
    assert own == {"columns": ["topic", "client 3", "client 5"], "rows": [["a", 2, 1], ["b", 0, 4]]}
    assert "metadata data" not in figures.partition_svg(record, standalone=True)


@pytest.mark.parametrize("name", ["</metadata><script>", "a & b", "\x1b[31m", "\u202e", "$x$"])
def test_no_name_breaks_out_of_the_picture(name):
    picture = figures.line_chart({name: ([0], [1.0]), "b": ([0], [2.0])}, "round", "loss")
    own = numbers(picture)["lines"][0]["name"]
    assert (
        "<script>" not in picture
        and own.replace("\\x1b", "\x1b").replace("\\u202e", "\u202e") == name
    )


def test_numbers_stand_in_the_element_and_not_beside_it():
    assert embedded("<svg a='1'></svg>", None) == "<svg a='1'></svg>"
    picture = embedded("<svg a='1'></svg>", {"lines": [line("<", [1], None)]})
    assert picture.startswith("<svg a='1'><metadata") and picture.endswith("</metadata></svg>")
    assert table(["a"], [[float("inf")], ["\x07"]])["table"]["rows"] == [[None], ["\\x07"]]
