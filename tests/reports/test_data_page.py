"""The page of ``fedloom data stats`` by hand: twelve rows of two clients, of which they share one text."""

import re

import pytest

from fedloom.experiment.experiment import Experiment
from fedloom.reports import figures
from fedloom.reports.data_page import client_rows, render, summary
from fedloom.runs.data_statistics import data_statistics

ROWS = [
    *({"text": f"a{i}", "label": "x", "site": "one"} for i in range(5)),
    {"text": "shared", "label": "y", "site": "one"},
    {"text": "shared", "label": "y", "site": "two"},
    *({"text": f"длинный {i} " + "слово " * 20, "label": "y", "site": "two"} for i in range(5)),
]


@pytest.fixture
def record(table, rows_file):
    held = [{"text": f"held {i}", "label": "xy"[i % 2], "site": "one"} for i in range(4)]
    data = {"source": rows_file(ROWS), "test_source": rows_file(held, "held.jsonl")}
    data |= {"kind": "labelled", "max_length": 40}
    partition = {"kind": "column", "column": "site", "client_test_fraction": 0.0, "minimum": 1}
    changed = {"data": data, "partition": partition, "federation": {"clients": 2}}
    changed["objective"] = {"name": "classification"}
    return data_statistics(Experiment.from_table({**table, **changed}))


def test_numbers_are_those_that_were_counted(record):
    told = summary(record)
    assert told[0].startswith("12 labelled rows of 2 clients")
    assert told[1] == "data.max_length = 40 cuts 5 training rows (41.7%)"  # 5 of 12
    assert told[2] == "1 of 11 different texts are with more than one client"
    assert sorted(own["rows"] for own in client_rows(record)) == ["6", "6"]
    one, two = sorted(client_rows(record), key=lambda own: own["cut"])
    assert (one["cut"], two["cut"]) == ("0", "5 (83%)")
    assert (one["labels"], two["labels"]) == ("x 83%, y 17%", "y 100%")
    assert (one["script"], two["script"]) == ("Latin 100%", "Cyrillic 83%, Latin 17%")
    assert [own["shared"] for own in record["overlaps"]["rows"]["largest"]] == [1]


def test_settings_keep_their_letters_and_words_stand_at_the_left(record):
    page = render(record)
    assert "<li>data.max_length = 40 cuts 5 training rows (41.7%).</li>" in page
    assert 'class="list">labels</th>' in page and "Rows that two clients share" in page


def test_what_says_nothing_is_left_out(record):
    """No text is shared, all are of one script, and there are no labels."""
    rows = {**record["overlaps"]["rows"], "twice": 0}
    scripts = {**record["scripts"], "values": ["Latin"]}
    overlaps = {**record["overlaps"], "rows": rows}
    page = render({**record, "overlaps": overlaps, "scripts": scripts, "labels": None})
    for title in ("Rows that two clients share", "Script of most letters", "labels</th>"):
        assert title not in page and title in render(record)


def test_colours_of_shared_rows_go_from_none_to_the_most_that_two_share():
    """What a client has itself is not shown, and does not count; whole numbers alone."""
    chart = figures.matrix_chart([[141, 2], [2, 46]], ["0", "1"], "rows", diagonal=False)
    ticks = [float(text) for text in re.findall(r">\s*(\d+(?:\.\d+)?)\s*</text>", chart)]
    assert max(ticks) == 2 and all(own == int(own) for own in ticks)


def test_of_many_clients_every_second_is_named():
    square = [[0] * 40 for _ in range(40)]
    chart = figures.matrix_chart(square, list(map(str, range(40))), "rows", diagonal=False)
    shown = re.findall(r">\s*(\d+)\s*</text>", chart)
    assert shown.count("38") == 2 and "39" not in shown
