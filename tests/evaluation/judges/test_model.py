"""A local judge: a real model in a real folder, whose weights make it say one thing."""

import pytest

from fedloom.errors import ModelError
from fedloom.evaluation.judges.base import Case
from fedloom.evaluation.judges.model import ModelJudge
from fedloom.evaluation.questions import Question
from judge_server import parrot

CASES = [
    Case(Question("1", "Two and two?"), ("four", "five")),
    Case(Question("2", "Sky?"), ("blue", "red")),
]


@pytest.mark.parametrize(
    ("text", "scores", "reason"),
    [("8 6", (8.0, 6.0), ""), ("8", None, "unparsable"), ("8 60", None, "out of range")],
)
def test_a_local_judge_is_asked_and_read(tmp_path, model_folder, text, scores, reason):
    judge = ModelJudge(parrot(tmp_path / "judge", model_folder, text), temperature=0.0)
    for found in judge.rate(CASES):
        assert (found.scores, found.reason) == (scores, reason)
    assert judge.costs() == {"requests": 2.0} and judge.name == "judge"


def test_a_prompt_that_does_not_fit_is_counted_and_not_asked(tmp_path, model_folder):
    judge = ModelJudge(parrot(tmp_path / "judge", model_folder, "8 6"), temperature=0.0)
    long = Case(CASES[0].question, ("word " * 5000, "five"))
    found = judge.rate([CASES[0], long, CASES[1]])
    assert [v.scores for v in found] == [(8, 6), None, (8, 6)]
    assert found[1].reason == "longer than the judge's context"


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(ModelError, match=r"config\.json"):
        ModelJudge(str(tmp_path))


def test_an_unreadable_verdict_is_asked_for_again_with_another_seed(
    tmp_path, model_folder, monkeypatch
):
    judge = ModelJudge(parrot(tmp_path / "judge", model_folder, "8 6"), temperature=0.5)
    seeds = []

    def moody(model, encoder, asks, *_):
        seeds.append([ask.seed for ask in asks])
        texts = [encoder.tokenizer.decode(ask.prompt) for ask in asks]
        return [
            "8 6" if ask.seed >= 1 and "Sky" in text else "hm"
            for ask, text in zip(asks, texts, strict=True)
        ]

    monkeypatch.setattr("fedloom.evaluation.judges.model.generate", moody)
    found = judge.rate(CASES)
    assert seeds == [[0, 0], [1, 1], [2]]
    assert [v.scores for v in found] == [None, (8, 6)] and found[0].reason == "unparsable"
    assert judge.costs() == {"requests": 5.0}
