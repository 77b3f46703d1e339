"""Expressions over columns: what they may say, what is refused, and what a row costs at most."""

import time

import pytest

from fedloom.data.expressions import ExpressionError, parse_expression
from fedloom.data.rows import RowError

ROW = {
    "q": "  What is 2 + 2?  ",
    "lang": "en",
    "score": 4,
    "tags": ["a", "b"],
    "messages": [{"role": "user", "content": "Hi"}],
    "my column": "x",
    "none": None,
}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("score >= 4 and lang in ['en', 'de']", True),
        ("1 < score < 4", False),
        ("lang not in ('fr', 'de') or score / 0", True),  # what is not needed is not computed
        ("q.strip().lower() + '\\n' + lang", "what is 2 + 2?\nen"),
        ("q.strip()[:4]", "What"),
        ("messages[0]['content'] + str(score)", "Hi4"),
        ("row['my column'] if not none else 'y'", "x"),
        ("row.get('absent', 'other')", "other"),
        ("row.get('none') is None", True),
        ("len(tags) + words(q) * 2 - 7 // 2 % 2", 2 + 5 * 2 - 1),
        ("max(score, 7) - -1.5", 8.5),
        ("round(2.345, 1)", 2.3),
        ("lang.replace('e', 'EE').split('E')", ["", "", "n"]),
        ("'a' in tags and 'What' in q", True),
        ("tags + ['c']", ["a", "b", "c"]),
        ("none is not None or score is True", False),
        ("10 - 4 - 3 * 2 // 5 % 4", 5),
        ("+".join(["score"] * 60), 240),  # long, and not deep
        ("len(" + " + '-' + ".join(["lang"] * 50) + ")", 149),
    ],
)
def test_its_value_is_pythons(text, value):
    assert parse_expression(text).of(ROW) == value


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("__import__('os').system('true')", "which is not among"),
        ("q.__class__", r"holds 'q.__class__', which is not read here"),
        ("q.format(lang)", r"calls 'q.format'"),
        ("[x for x in tags]", "which is not read here"),
        ("(lambda: 1)()", "which is not among"),
        ("f'{q}'", "which is not read here"),
        ("2 ** 99999999", "which is not read here"),
        ("score << 99999999", "which is not read here"),
        ("len(q, lang)", r"calls len\(\) with 2 arguments, it takes 1"),
        ("q.replace('a')", r"calls .replace\(\) with 1 arguments, it takes 2"),
        ("q[::2]", "a slice with a step"),
        ("row", "row stands before"),
        ("lang is 'en'", "is and is not stand before None, True and False alone; write =="),
        ("score is not none", "is and is not stand before"),
        ("score =", "is no expression"),
        ("(" * 150 + "q" + ")" * 150 + " + " + "-" * 60 + "1", "deeper than|is no expression"),
        ("+".join(["score"] * 200), "has 600 parts, at most 200|parts, at most 200"),
        ("'" + "a" * 2000 + "'", "has 2002 characters, at most 2000"),
        ("", "is no expression"),
    ],
)
def test_what_is_none_is_refused_by_the_part_that_is_not(text, told):
    with pytest.raises(ExpressionError, match=told):
        parse_expression(text)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("absent > 1", "column 'absent' is missing"),
        ("score + lang", "a number is needed, got 'en'"),
        ("'ab' * 99999999", "a number is needed"),
        ("lang % 1", "a number is needed"),
        ("score.lower()", "a text is needed, got 4"),
        ("score / 0", "division by zero"),
        ("int(lang)", "invalid literal"),
        ("tags[5]", "list index out of range"),
        ("none > 1", "not supported"),
        ("round(score, 0 - 999999999)", "round"),
        ("str(tags)", r"str\(\) is of a number or a text"),
        ("[tags, tags]", "a list within a list is not made here"),
        ("*".join(["9999999999999999999"] * 80), "an integer of more than 4096 bits"),
        ("int('" + "9" * 1500 + "')", "an integer of more than 4096 bits"),
    ],
)
def test_a_row_without_a_value_is_malformed_and_told(text, told):
    with pytest.raises(RowError, match=told) as raised:
        parse_expression(text).of(ROW)
    assert raised.value.malformed


def test_what_grows_beyond_a_row_is_stopped_before_it_is_made():
    grown = "q" + ".replace('a', 'aaaaaaaaaaaaaaaa')" * 9  # 16**9 letters from one
    begun = time.process_time()
    with pytest.raises(RowError, match="longer than 16777216 characters"):
        parse_expression(grown).of({"q": "a"})
    assert time.process_time() - begun < 2


def test_what_is_made_of_what_was_made_does_not_grow_without_end():
    row, begun = {"n": [3], "d": [{"a": "x" * 2**20}]}, time.process_time()
    for text in ("n", "d"):
        grown = parse_expression("+".join([text] * 90))
        longest = 90**2 if text == "n" else 1
        while len(row[text]) < longest:
            row[text] = grown.of(row)
        with pytest.raises(RowError, match="longer than 16777216 characters"):
            grown.of(row)
    assert time.process_time() - begun < 1


def test_a_message_holds_no_more_than_the_beginning_of_a_rows_text():
    with pytest.raises(RowError, match="could not convert") as raised:
        parse_expression("float(q)").of({"q": "private " * 10_000})
    assert len(str(raised.value)) < 200


def test_columns_that_every_row_needs_are_known():
    own = parse_expression("a + row['b'] + row.get('c', '')")
    assert own.columns == ("a", "b")
