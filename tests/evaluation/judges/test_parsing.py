"""What counts as a verdict."""

import pytest

from fedloom.evaluation.judges.parsing import parse_judgelm

SCALE = (1.0, 10.0)


@pytest.mark.parametrize(
    ("text", "scores", "reason"),
    [
        ("8 7\nThe first is better.", (8, 7), ""),
        ("\n 8.5, 7 \nbecause", (8.5, 7), ""),
        ("8 7\n10 1", (8, 7), ""),
        ("8 7 9", None, "unparsable"),
        ("Assistant 1: 8 Assistant 2: 7", None, "unparsable"),
        ("", None, "no answer: empty"),
        ("0 7", None, "out of range"),
        ("8 70", None, "out of range"),
    ],
)
def test_judgelms_verdict_is_its_first_line_and_nothing_else(text, scores, reason):
    found = parse_judgelm(text, 2, SCALE)
    assert (found.scores, found.reason) == (scores, reason)
