"""Lengths, scripts and overlaps, by hand."""

import numpy as np
import pytest

from fedloom.data.text_statistics import (
    NO_LETTERS,
    length_bins,
    length_summary,
    main_script,
    matrix_of,
    shared,
)


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("What is 2 + 2?", "Latin"),
        ("Привет, world", "Cyrillic"),
        ("今天天气很好 ok", "Han"),
        ("ひらがな", "Hiragana"),
        ("\uff26\uff35", "Latin"),
        ("नमस्ते", "Devanagari"),
        ("a\u0431", "Cyrillic"),  # alike in number: the first by name
        ("2 + 2 = 4", NO_LETTERS),
        ("", NO_LETTERS),
    ],
)
def test_the_script_of_most_letters(text, script):
    assert main_script(text) == script


def test_lengths_in_bins_that_double():
    lengths = np.array([16, 31, 32, 100])
    assert length_bins(lengths) == {"16-31": 2, "32-63": 1, "64-127": 1}
    assert length_bins(np.array([1, 15])) == {"1-15": 2}
    assert length_bins(np.zeros(0, np.int64)) == {}
    told = length_summary(np.arange(1, 101))
    assert told == {"mean": 50.5, "p5": 6.0, "p50": 51.0, "p95": 96.0, "most": 100.0}


def test_what_clients_share_by_hand():
    found = shared({4: "aab", 2: "abc", 9: "xc"})
    assert found.distinct == {2: 3, 4: 2, 9: 2}
    assert found.pairs == {(2, 4): 2, (2, 9): 1}
    assert found.holders == {1: 1, 2: 3} and found.all == 4 and found.twice == 3
    assert matrix_of(found, [2, 4, 9]) == [[3, 2, 1], [2, 2, 0], [1, 0, 2]]
