"""The audit on judges whose accuracy is known."""

import json

import pytest

from fedloom.errors import DataError
from fedloom.evaluation.judges.base import Verdict
from fedloom.evaluation.judges.rules import RULES
from fedloom.evaluation.judges.validation import audit, read_audit_sets


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "llmbar").mkdir()
    rows = [
        {"input": "q1", "output_1": "good", "output_2": "a bad long one", "label": 1},
        {"input": "q2", "output_1": "bad", "output_2": "good and long", "label": 2},
        {"input": "q3", "output_1": "good", "output_2": "bad but long", "label": 1},
        {"input": "q4", "output_1": "good", "output_2": "b", "label": 3},
        {"broken": True},
    ]
    (tmp_path / "llmbar/Own.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    votes = [(1, 1, 2), (2, 0, 2), (0, 0, 1), (0, 1, 2)]
    rows = [
        {
            "instruction": "do", "input": f"{i}", "response1": "good" if 1 in v else "bad",
            "response2": "bad" if 1 in v else "good", "annotator1": v[0], "annotator2": v[1],
            "annotator3": v[2],
        }
        for i, v in enumerate(votes)
    ]  # fmt: skip
    rows.append({**rows[0], "response1": True})
    (tmp_path / "panda.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "other.jsonl").write_text('{"prompt": "x"}\n')
    return tmp_path


class Judge:
    """Scores by a function of the answer and its place."""

    name, compares, scale = "own", True, (1.0, 10.0)

    def __init__(self, score):
        self.score = score

    def rate(self, cases):
        found = []
        for case in cases:
            scores = [self.score(answer, place) for place, answer in enumerate(case.answers)]
            found.append(
                Verdict(tuple(scores)) if None not in scores else Verdict(None, "unparsable")
            )
        return found

    def costs(self):
        return {}

    def check(self):
        pass


def test_layouts_and_what_is_left_out(folder):
    llmbar, panda = read_audit_sets(folder)
    assert (llmbar.name, len(llmbar.pairs), llmbar.undecided, llmbar.malformed) == (
        "llmbar/Own",
        3,
        1,
        1,
    )
    assert len(panda.pairs) == 2 and panda.undecided == 2 and panda.malformed == 1
    assert [pair.better for pair in panda.pairs] == [1, 2]
    assert panda.pairs[0].question.text == "do\n\n0"
    assert len(read_audit_sets(folder / "llmbar/Own.jsonl", 2)[0].pairs) == 2


def test_verdicts_are_understood_as_in_training(tmp_path):
    rows = [
        {"input": f"{i}", "output_1": "a", "output_2": "b", "label": label}
        for i, label in enumerate([1, "2", "output_2", "tie", None, 7])
    ]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (found,) = read_audit_sets(tmp_path)
    assert [pair.better for pair in found.pairs] == [1, 2, 2] and found.undecided == 3


@pytest.mark.parametrize(
    ("score", "accuracy", "consistent", "tied"),
    [
        (lambda answer, place: 9.0 if "good" in answer else 2.0, 1.0, 1.0, 0.0),
        (lambda answer, place: 9.0 if "bad" in answer else 2.0, 0.0, 1.0, 0.0),
        (lambda answer, place: 9.0 if place == 0 else 2.0, 0.5, 0.0, 1.0),
        (lambda answer, place: 5.0, 0.5, 0.0, 1.0),
    ],
)
def test_a_right_a_wrong_a_biased_and_an_undecided_judge(folder, score, accuracy, consistent, tied):
    found = audit(Judge(score), read_audit_sets(folder)[0], 0)
    assert (found.accuracy.mean, found.consistent.mean, found.tied.mean) == (
        accuracy,
        consistent,
        tied,
    )
    assert (found.pairs, found.scored) == (3, 3)
    assert found.longer_wins.mean == pytest.approx(1 / 3) and found.longer_wins.count == 3
    assert found.longer_wins.low < 1 / 3 < found.longer_wins.high


def test_a_judge_of_length_has_the_accuracy_of_length(folder):
    found = audit(RULES["longest"], read_audit_sets(folder)[0], 0)
    assert found.accuracy.mean == pytest.approx(found.longer_wins.mean)


def test_unusable_verdicts_are_counted_and_never_scored(folder):
    judge = Judge(lambda answer, place: None if "long" in answer else 5.0)
    found = audit(judge, read_audit_sets(folder)[0], 0)
    assert found.scored == 0 and found.reasons == {"unparsable": 6} and found.accuracy.count == 0


def test_nothing_to_audit(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"prompt": "x"}\n')
    with pytest.raises(DataError, match="no judged pairs: they need output_1"):
        read_audit_sets(tmp_path)
