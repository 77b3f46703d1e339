"""Pairs and single answers that pull against each other: dropped by reason, or kept."""

import json

import numpy as np
import pytest

from fedloom.data.ambiguity import Claims
from fedloom.data.examples import Feedback, Instruction, Preference
from fedloom.data.loading import load_examples
from fedloom.data.sources import DataSettings

CALL = {"function": {"name": "clock", "arguments": {}}}


def unambiguous(examples):
    claims = Claims()
    for example in examples:
        claims.add(example)
    kept, dropped = claims.unambiguous()
    return [examples[place] for place in kept], dropped


def chat(text, **more):
    return ({"role": "assistant", "content": text, **more},)


def test_pairs_that_are_marked_both_ways_go_with_all_their_rows():
    pairs = [
        Preference(1, "p", "a", "b"),
        Preference(2, "p", "b ", " a"),  # the reverse, but for white space
        Preference(3, "p", "a", "b"),
        Preference(4, "q", "a", "b"),  # another prompt
        Preference(5, "p", "a", "c"),  # another answer
        Preference(6, "q", "a", "b"),  # twice the same way
    ]
    kept, dropped = unambiguous(pairs)
    assert [pair.row for pair in kept] == [4, 5, 6]
    assert dropped == {"the same pair is marked both ways": 3}


def test_answers_that_differ_in_white_space_alone_are_alike():
    pairs = [
        Preference(1, "p", "a  b\n", "a b"),
        Preference(2, "p", "ab", "a b"),
        Preference(3, (), chat("a b"), chat("a\nb")),
        Preference(
            4, (), chat("a"), chat("a", tool_calls=[CALL])
        ),  # says the same, calls something
    ]
    kept, dropped = unambiguous(pairs)
    assert [pair.row for pair in kept] == [2, 4]
    assert dropped == {"chosen and rejected differ in white space alone": 2}


def test_single_answers_with_both_labels_go():
    rows = [
        Feedback(1, "p", "a", True),
        Feedback(2, "p", "a ", False),
        Feedback(3, "p", "b", False),
        Feedback(4, "p", "b", False),
        Feedback(5, "q", "a", True),
        Feedback(6, "p", "a", False, tools=({"function": {"name": "clock"}},)),
    ]
    kept, dropped = unambiguous(rows)
    assert [row.row for row in kept] == [3, 4, 5, 6]
    assert dropped == {"the same answer is desirable and undesirable": 2}


def test_a_row_that_gives_both_labels_was_asked_for():
    rows = [Feedback(7, "p", "a", True), Feedback(7, "p", "a", False)]  # data.incomplete_pairs
    assert unambiguous(rows) == (rows, {})


def test_other_kinds_are_left_alone():
    rows = [Instruction(1, "p", "a"), Instruction(2, "p", "a")]
    assert unambiguous(rows) == (rows, {})


@pytest.mark.parametrize(("ambiguous", "rows"), [("drop", 7), ("keep", 9)])
def test_a_file_is_read_without_them_unless_they_are_kept(tmp_path, ambiguous, rows):
    table = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(8)]
    table.append({"prompt": "p3", "chosen": "b", "rejected": "a"})
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(map(json.dumps, table)))
    settings = DataSettings(source=str(path), kind="preference", ambiguous=ambiguous)
    data = load_examples(settings, np.random.default_rng(0))
    assert len(data.train) + len(data.test) == rows
    wanted = {} if ambiguous == "keep" else {"the same pair is marked both ways": 2}
    assert data.dropped == wanted


def test_each_file_is_looked_at_for_itself_as_on_its_owners_machine(tmp_path):
    for name, sides in (("a", ("x", "y")), ("b", ("y", "x"))):
        rows = [{"prompt": f"p{i}", "chosen": sides[0], "rejected": sides[1]} for i in range(5)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = DataSettings(source=str(tmp_path / "*.jsonl"), kind="preference")
    data = load_examples(settings, np.random.default_rng(0))
    assert len(data.train) + len(data.test) == 10 and data.dropped == {}
