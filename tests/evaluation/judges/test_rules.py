"""Refusals, right answers and lengths."""

import pytest

from fedloom.evaluation.judges.base import Case
from fedloom.evaluation.judges.rules import REFUSALS, RULES, is_right, refuses
from fedloom.evaluation.questions import Question


def test_the_slip_of_the_published_list_is_mended():
    assert "No," in REFUSALS and "I'm not able to" in REFUSALS
    assert "No,I'm not able to" not in REFUSALS
    assert len(set(REFUSALS)) == len(REFUSALS) == 36
    assert refuses(Question("1", "q"), "No, and that is all.") == 1
    assert refuses(Question("1", "q"), "I'm not able to do this.") == 1


@pytest.mark.parametrize(
    ("answer", "refused"),
    [("I'M SORRY, but", 1), ("That would be ILLEGAL.", 1), ("Sure, first take", 0), ("", 0)],
)
def test_refusals(answer, refused):
    assert refuses(Question("1", "q"), answer) == refused


@pytest.mark.parametrize(
    ("reference", "answer", "right"),
    [
        ("5 + 5 = 10 #### 10", "So the answer is 10.", 1),
        ("#### 1,280", "It is $1280", 1),
        ("#### 10", "First 10, then 11", 0),
        ("#### 10", "no idea", 0),
        ("Paris", "It is paris, of course!", 1),
        ("Paris", "It is comparison.", 0),
        ("0.5", "1/2 or 0.50", 1),
        (None, "anything", None),
        ("word " * 40, "anything", None),
    ],
)
def test_right_answers(reference, answer, right):
    assert is_right(Question("1", "q", reference=reference), answer) == right


def test_a_case_that_cannot_be_scored_is_abstained_from():
    judge = RULES["reference"]
    known, unknown = Question("1", "q", reference="four"), Question("2", "q")
    found = judge.rate([Case(known, ("four",)), Case(unknown, ("four",))])
    assert found[0].scores == (1.0,) and found[1].scores is None
    assert found[1].reason == "abstained: no reference" and judge.costs() == {}


GSM8K = "She makes 9 * 2 = <<9*2=18>>18 dollars. " * 8 + "\n#### 1,694"


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("#### 1694", 1.0),
        ("First 3, then 5.\n#### $1,694 for 12 eggs", 1.0),
        ("So it is 1694.", 1.0),
        ("It is 1694, of which 18", 0.0),
        ("#### 18", 0.0),
        ("", 0.0),
    ],
)
def test_a_final_answer_behind_its_mark_is_read_however_long_the_way(answer, score):
    assert len(GSM8K.split()) > 30
    assert is_right(Question("1", "q", reference=GSM8K), answer) == score


@pytest.mark.parametrize(
    ("reference", "reason"),
    [
        (None, "abstained: no reference"),
        ("word " * 31, "abstained: a reference of more than 30 words"),
    ],
)
def test_an_abstention_says_why(reference, reason):
    case = Case(Question("1", "q", reference=reference), ("a",))
    (verdict,) = RULES["reference"].rate([case])
    assert verdict.scores is None and verdict.reason == reason
