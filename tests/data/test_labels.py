"""What is understood without a word, what data.values say, and what is never guessed."""

import pytest

from fedloom.data.labels import (
    best_of,
    better,
    by_scores,
    desirable,
    example_line,
    majority,
    wrong_values,
)
from fedloom.data.rows import RowError

PAIR = ("output_1", "output_2")


@pytest.mark.parametrize(
    ("yes", "no"),
    [
        (True, False),
        (1, 0),
        (1.0, 0.0),
        ("1", "0"),
        ("TRUE", "FALSE"),
        ("yes", "no"),
        ("good", "bad"),
        ("up", "down"),
        ("thumbs_up", "thumbs_down"),
        ("Thumbs up", "Thumbs down"),
        ("👍", "👎"),
        ("desirable", "undesirable"),
        ("positive", "negative"),
    ],
)
def test_what_can_mean_one_thing_only_needs_no_map(yes, no):
    assert desirable(yes, {}) is True and desirable(no, {}) is False


@pytest.mark.parametrize("value", [5, "5", 2, -1, 0.5, "maybe", None, "", "1_full_compliance"])
def test_scales_and_other_words_are_never_guessed(value):
    with pytest.raises(RowError, match="label must be true or false, got ") as caught:
        desirable(value, {})
    assert caught.value.malformed


SCALE = {"desirable": [">= 4"], "undesirable": ["<= 2"]}


@pytest.mark.parametrize(
    ("value", "expected"), [(5, True), ("4", True), (4.0, True), (2, False), ("1.5", False)]
)
def test_comparisons(value, expected):
    assert desirable(value, SCALE) is expected


@pytest.mark.parametrize("value", [3, "3", "x", True])
def test_what_lies_between_is_dropped_and_counted_under_one_reason(value):
    with pytest.raises(RowError, match=r"^label is not among data\.values$") as caught:
        desirable(value, SCALE)
    assert not caught.value.malformed


def test_a_value_may_be_written_as_number_text_or_truth():
    values = {"desirable": [5, "Great"], "undesirable": [False, "1"]}
    assert [desirable(v, values) for v in (5, "5", 5.0, "great")] == [True] * 4
    assert [desirable(v, values) for v in (False, "false", 1, "1.0")] == [False] * 4


@pytest.mark.parametrize(
    ("value", "names", "place"),
    [
        (1, PAIR, 0),
        (2.0, PAIR, 1),
        ("2", PAIR, 1),
        ("output_2", PAIR, 1),
        ("A", ("response_a", "response_b"), 0),
        ("model_b", ("response_a", "response_b"), 1),
        (0, ("response_0", "response_1"), 0),
    ],
)
def test_a_verdict_names_an_answer(value, names, place):
    assert better(value, names, {}) == place


@pytest.mark.parametrize(
    ("value", "values", "reason", "malformed"),
    [
        ("tie", {}, "tie between the answers", False),
        ("both", {"first": ["A"], "tie": ["both"]}, "tie between the answers", False),
        ("C", {"first": ["A"], "second": ["B"]}, r"not among data\.values", False),
        (None, {}, "no verdict", False),
        (float("nan"), {}, "no verdict", False),
        (0, {}, "label must say which output is better, 1 or 2, got 0", True),
        (True, {}, "1 or 2, got True", True),
    ],
)
def test_a_verdict_that_names_none(value, values, reason, malformed):
    with pytest.raises(RowError, match=reason) as caught:
        better(value, PAIR, values)
    assert caught.value.malformed is malformed
    assert better("A", PAIR, {"first": ["A"], "second": ["B"]}) == 0


def test_the_place_of_the_best_is_counted_from_0_or_it_is_the_answer_itself():
    assert [best_of(v, ["x", "y", "z"], "best") for v in (0, "2", "y")] == [0, 2, 1]
    for value in (3, -1, 0.5, True, "other"):
        with pytest.raises(RowError, match="the place of one of 3 answers, counted from 0"):
            best_of(value, ["x", "y", "z"], "best")
    with pytest.raises(RowError, match="0, got 'x'"):
        best_of("x", ["x", "x"], "best")


def test_scores_and_margins():
    assert by_scores([2, 5, 1, 5], 4, None, "scores") == (1, 2)
    assert by_scores(["0.5", 1], 2, 0.5, "scores") == (1, 0)
    for scores, margin, reason in (
        ([3, 3], None, "tie between the answers"),
        ([3, 2.6], 0.5, r"scores closer than data\.min_margin = 0\.5"),
    ):
        with pytest.raises(RowError, match=reason) as caught:
            by_scores(scores, 2, margin, "scores")
        assert not caught.value.malformed
    for scores in ([1], [1, None], "12", [1, True]):
        with pytest.raises(RowError, match="scores must be 2 numbers, one an answer"):
            by_scores(scores, 2, None, "scores")


def test_of_three_annotators_the_majority_decides():
    assert majority([2, 1, 2], {}, PAIR, "annotators") == 1
    assert majority([1, None, 1], {"first": [0], "second": [1]}, PAIR, "annotators") == 1
    for votes, reason in (
        ([1, 2, 0], "no majority"),
        ([0, 0, 1], "tie between"),
        ([None] * 3, "no verdict"),
    ):
        with pytest.raises(RowError, match=reason) as caught:
            majority(votes, {}, PAIR, "annotators")
        assert not caught.value.malformed
    with pytest.raises(RowError, match="annotators must say which output is better"):
        majority([1, 1, 7], {}, PAIR, "annotators")


@pytest.mark.parametrize(
    ("found", "kind", "line"),
    [
        (
            {"1": 9, "2": 5, "5": 70},
            "feedback",
            'values = { desirable = ["> 3"], undesirable = ["< 3"] }',
        ),
        (
            {"b": 5, "a": 4, "c": 1},
            "feedback",
            'values = { desirable = ["a"], undesirable = ["b"] }',
        ),
        (
            {'say "x"': 5},
            "preference",
            'values = { first = ["say \\"x\\""], second = ["..."] }',
        ),
        (
            {"1.0": 9, "1.7": 5, "2.0": 7},
            "preference",
            'values = { first = ["< 1.5"], second = ["> 1.5"] }',
        ),
    ],
)
def test_the_line_to_paste(found, kind, line):
    assert example_line(found, kind) == line


@pytest.mark.parametrize(
    ("values", "kinds", "words"),
    [
        ({"good": ["5"]}, ["feedback"], "data.values.good: unknown key; there are desirable, und"),
        ({"tie": ["5"]}, ["preference"], "data.values must say what means first or second"),
        ({"desirable": [">= much"]}, ["feedback"], "'>= much' is not a comparison with a number"),
        (
            {"desirable": [5], "undesirable": ["5"]},
            ["feedback"],
            "data.values: '5' stands there twice",
        ),
        (
            {"desirable": [5]},
            ["labelled"],
            "says what labels of feedback or verdicts of preferences",
        ),
    ],
)
def test_values_that_say_nothing(values, kinds, words):
    assert any(words in text for text in wrong_values(values, kinds))


def test_values_may_be_for_two_kinds():
    both = {"desirable": ["5"], "undesirable": ["1"], "first": ["A"], "second": ["B"]}
    assert wrong_values(both, ["feedback", "preference"]) == []
