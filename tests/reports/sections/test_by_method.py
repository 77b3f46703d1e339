"""Figures of a method's own on the pages: numbers by round and by client, of one run and over seeds."""

from types import SimpleNamespace

import pytest

from fedloom.reports.html import fill
from fedloom.reports.judged import band_words, seeds_line
from fedloom.reports.sections import by_method, client_table, line_chart
from fedloom.reports.sections.details import numbers_by_round
from fedloom.reports.sections.spec import KINDS, SectionSpec
from fedloom.statistics.intervals import mean_interval


def run(values, seed=0, kind="line_chart"):
    """A run whose method wrote a value into each round from 1."""
    spec = {"kind": kind, "title": "Mine <b>", "text": "What it is.", "key": "own_figure"}
    rounds = [{"round": 0, "details": {}}]
    rounds += [{"round": r, "details": {"own_figure": own}} for r, own in enumerate(values, 1)]
    return SimpleNamespace(run={"seed": seed, "sections": [spec]}, rounds=rounds)


@pytest.fixture
def lines(monkeypatch):
    """What is drawn, instead of a picture of it."""
    from fedloom.reports import figures

    found = {}

    def chart(lines, x_label, y_label, *, bands):
        found.update(lines=lines, bands=bands, labels=(x_label, y_label))
        return "<svg></svg>"

    monkeypatch.setattr(figures, "line_chart", chart)
    return found


def test_every_kind_is_drawn_and_has_its_template():
    assert tuple(by_method.DRAW) == KINDS
    assert SectionSpec.from_record({"kind": "new", "more": 1}) == SectionSpec("new", "", "", "")


def test_numbers_are_lines_by_name(lines):
    assert line_chart.draw("own_figure", [run([1, 0.5, None])])["bands"] == ""
    assert lines["lines"] == {"": ([1, 2], [1, 0.5])} and lines["labels"] == ("round", "own figure")
    line_chart.draw("own_figure", [run([{"a": 1, "b": 2}, {"b": 4}])])
    assert lines["lines"] == {"a": ([1], [1]), "b": ([1, 2], [2, 4])} and lines["bands"] == {}


def test_of_many_names_the_mean_and_the_ends_are_drawn(lines):
    line_chart.draw("own_figure", [run([{str(n): n for n in range(9)}])])
    assert lines["lines"] == {"lowest": ([1], [0]), "mean": ([1], [4]), "highest": ([1], [8])}


def test_seeds_are_a_mean_with_a_band(lines):
    """Two seeds: from the lowest to the highest, at the rounds that both have."""
    content = line_chart.draw("own_figure", [run([1, 2, 3]), run([3, 6], seed=1)])
    assert lines["lines"] == {"": ([1, 2], [2, 4])}
    assert lines["bands"] == {"": ([1, 2], [1, 2], [3, 6])}
    assert content["bands"].startswith("the band goes from the lowest to the highest seed")


def test_from_five_seeds_on_a_band_is_an_interval():
    """1 to 5: mean 3, deviation sqrt(2.5), t(4) 2.776: 3 +- 1.963; where all are alike there is none."""
    seeds = [([0.0, 1.0], [0.5, float(n)]) for n in range(1, 6)]
    mean, (rounds, low, high) = seeds_line(seeds, lambda ys: mean_interval(ys, "seeds"))
    assert mean == ([0, 1], [0.5, 3]) and rounds == [1]
    assert (low[0], high[0]) == pytest.approx((1.0367, 4.9633), abs=1e-3)
    _, (rounds, low, high) = seeds_line(seeds[:4], lambda ys: mean_interval(ys, "seeds"))
    assert (rounds, low, high) == ([0, 1], [0.5, 1], [0.5, 4])


def test_what_a_band_is_is_said_by_the_number_of_seeds():
    few = "from the lowest to the highest seed, as 95 % over seeds needs at least 5"
    assert band_words([1, 1]) == "" and band_words([5, 7]) == "the band is of 95 % over seeds"
    assert band_words([1, 4]) == f"the band goes {few}"
    assert band_words([4, 5]) == f"the band is of 95 % over seeds; of fewer than 5 it goes {few}"


def test_clients_by_rounds_with_the_first_and_last_of_many():
    values = [{"10": r, "9": r + 0.25} for r in range(1, 31)]
    content = client_table.draw("own_figure", [run(values)])
    columns, rows = content["table"].columns, content["table"].rows
    assert (columns[0], columns[1], columns[-1], len(columns)) == (
        "client",
        "round 1",
        "round 30",
        13,
    )
    assert [row[0] for row in rows] == ["9", "10"] and content["left_out"] == 18
    page = fill("sections/client_table.html.j2", own=content)
    assert "<tr><td>9</td><td>1.25</td>" in page and "<tr><td>10</td><td>1</td>" in page
    assert "18 rounds between these are left out" in page
    left, other = client_table.draw("own_figure", [run([{"1": 2, "2": 3}, {"1": 4}])])["table"].rows
    assert (left, other) == (["1", "2", "4"], ["2", "3", "-"])


def test_a_section_is_escaped_and_says_whose_seed_it_is():
    runs = [run([{"<i>": 1e4}], seed=seed, kind="client_table") for seed in (4, 5)]
    (own,) = by_method.drawn(runs)
    page = fill("by_method.html.j2", part=own)
    assert "<h2>Mine &lt;b&gt;</h2>" in page and "What it is. Of the run of seed 4." in page
    assert "<td>&lt;i&gt;</td><td>10\u202f000</td>" in page
    (own,) = by_method.drawn(runs[:1])
    assert "Of the run of seed" not in fill("by_method.html.j2", part=own)


@pytest.mark.parametrize(
    ("kind", "value", "why"),
    [
        ("line_chart", "x", "kind 'line_chart' cannot draw details['own_figure']: details['own_figure'] of round 2 is 'x'; it must be a number, or numbers by name"),
        ("line_chart", {"a": True}, "is {'a': True}; it must be a number, or numbers by name"),
        ("client_table", 3, "of round 2 is 3; it must be numbers by client id"),
        ("client_table", [1] * 99, "1, 1...; it must be numbers by client id"),
        ("pie", {"1": 1}, "this release draws no section of kind 'pie'"),
    ],
)  # fmt: skip
def test_what_cannot_be_drawn_is_said_in_its_place(kind, value, why):
    (own,) = by_method.drawn([run([{"1": 1}, value], kind=kind)])
    assert own.content == {} and why in own.note
    assert '<p class="note">' in fill("by_method.html.j2", part=own)


@pytest.mark.parametrize("sections", [3, "x", ["x", 1]])
def test_a_record_that_was_changed_declares_nothing(sections):
    own = SimpleNamespace(run={"seed": 0, "sections": sections}, rounds=[])
    assert by_method.drawn([own]) == []


def test_nothing_written_is_said_too():
    (own,) = by_method.drawn([run([])])
    assert own.note == "no round has anything under details['own_figure']"
    assert numbers_by_round(run([]), "own_figure") == {}
