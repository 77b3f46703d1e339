"""Pairs made of labelled texts: sides, lengths, no text on both sides of a pair, nothing used twice."""

import numpy as np
import pytest

from fedloom.data.continuations import ContinuationSettings, continuations
from fedloom.data.examples import Labelled
from fedloom.errors import DataError


def texts(count=6, words=30):
    """Each word says whose text it is and where it stood: p3.7 is word 7 of text 3, a positive one."""
    return [
        Labelled(n, " ".join(f"{label[0]}{n}.{w}" for w in range(words)), label)
        for n in range(count)
        for label in ("pos", "neg")
    ]


def make(rows=None, **settings):
    own = ContinuationSettings(
        **{"chosen": "pos", "rejected": "neg", "prompt_words": 2, "words": 3, **settings}
    )
    return continuations(texts() if rows is None else rows, own, np.random.default_rng(0))


def owners(text):
    return {word.split(".")[0] for word in text.split()}


def test_sides_are_of_the_classes_and_no_text_meets_itself():
    pairs = make()
    assert len(pairs) == 6
    for pair in pairs:
        (prompt,), (chosen,), (rejected,) = map(owners, (pair.prompt, pair.chosen, pair.rejected))
        assert chosen[0] == "p" and rejected[0] == "n" and prompt not in (chosen, rejected)
        assert [w.split(".")[1] for w in pair.prompt.split()] == ["0", "1"]
        assert [w.split(".")[1] for w in pair.chosen.split()] == ["2", "3", "4"]
        assert pair.columns == {
            "prompt_class": {"p": "pos", "n": "neg"}[prompt[0]],
            "prefers": "pos",
        }
    assert {pair.columns["prompt_class"] for pair in pairs} == {"pos", "neg"}
    assert [pair.row for pair in pairs] == [1, 2, 3, 4, 5, 6]


def test_no_words_are_used_twice():
    pairs = make(passages=4)
    assert len(pairs) == 24
    for side in ("prompt", "chosen", "rejected"):
        words = [w for pair in pairs for w in getattr(pair, side).split()]
        assert len(words) == len(set(words))


def test_every_other_two_prefer_the_other_class_where_clients_are_to_be_opposed():
    pairs = make(passages=2, opposed=True)
    for pair in pairs:
        (chosen,) = owners(pair.chosen)
        assert {"p": "pos", "n": "neg"}[chosen[0]] == pair.columns["prefers"]
    assert sum(pair.columns["prefers"] == "neg" for pair in pairs) == 4  # two of each six


def test_the_draw_comes_from_the_generator():
    assert make() == make()
    other = ContinuationSettings(chosen="pos", rejected="neg", prompt_words=2, words=3)
    assert continuations(texts(), other, np.random.default_rng(1)) != make()


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        (None, {"rejected": "bad"}, "0 texts of class 'bad' .* classes in the data: neg, pos"),
        (texts(words=4), {}, "0 texts of class 'pos' have 5 words"),
        (texts(count=1), {}, "1 texts of class 'pos'"),
    ],
)
def test_too_little_to_make_pairs_of(rows, settings, message):
    with pytest.raises(DataError, match=message):
        make(rows, **settings)
