"""Rows to examples: TRL's conventions, TRL itself as the oracle, and what is malformed."""

import pytest
from trl import extract_prompt as trl_extract_prompt
from trl import unpair_preference_dataset

from fedloom.data.examples import Feedback, Instruction, Labelled, Preference, unpair
from fedloom.data.row_parsing import (
    extract_prompt,
    fill_template,
    make_example,
    pair_or_feedback,
    renamed,
)
from fedloom.data.rows import RowError


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    ("kind", "row", "expected"),
    [
        ("instruction", {"prompt": "p", "completion": "c"}, Instruction(1, "p", "c")),
        ("instruction", {"text": "t"}, Instruction(1, "", "t")),
        (
            "instruction",
            {"messages": [user("a"), assistant("b"), user("c"), assistant("d")]},
            Instruction(1, (user("a"),), (assistant("b"), user("c"), assistant("d"))),
        ),
        (
            "instruction",
            {"messages": [assistant("hello"), user("a"), assistant("b")]},
            Instruction(1, (assistant("hello"), user("a")), (assistant("b"),)),
        ),
        (
            "instruction",
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            Instruction(1, (user("a"),), (assistant("b"),)),
        ),
        (
            "instruction",
            {"prompt": [user("a")], "completion": [assistant("b")]},
            Instruction(1, (user("a"),), (assistant("b"),)),
        ),
        (
            "preference",
            {"prompt": "p", "chosen": "a", "rejected": "b"},
            Preference(1, "p", "a", "b"),
        ),
        (
            "preference",
            {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]},
            Preference(1, (user("a"),), (assistant("b"),), (assistant("c"),)),
        ),
        (
            "feedback",
            {"prompt": "p", "completion": "c", "label": True},
            Feedback(1, "p", "c", True),
        ),
        (
            "feedback",
            {"prompt": "p", "completion": "c", "label": "0"},
            Feedback(1, "p", "c", False),
        ),
        (
            "feedback",
            {"messages": [user("a"), assistant("b")], "label": 1},
            Feedback(1, (user("a"),), (assistant("b"),), True),
        ),
        ("labelled", {"text": "t", "label": 3}, Labelled(1, "t", "3")),
        (
            "labelled",
            {"text": "t", "label": "x", "site": "A"},
            Labelled(1, "t", "x", {"site": "A"}),
        ),
    ],
)
def test_conventions(kind, row, expected):
    assert make_example(kind, 1, row) == expected


@pytest.mark.parametrize(
    ("kind", "row", "reason"),
    [
        ("instruction", {"prompt": "p", "completion": None}, "completion must be text, got None"),
        ("instruction", {"prompt": "p", "completion": "  "}, "completion is empty"),
        (
            "instruction",
            {"messages": [assistant("a"), user("b")]},
            "last message must be the assistant",
        ),
        ("instruction", {"messages": ["a"]}, "role and content"),
        ("instruction", {"messages": [{"role": "wizard", "content": "x"}]}, "role and content"),
        ("instruction", {"text": 3}, "text must be text, got 3"),
        ("preference", {"chosen": "a", "rejected": 3}, "rejected must be text"),
        ("preference", {"chosen": None, "rejected": ""}, "chosen and rejected missing"),
        (
            "preference",
            {"output_1": "a", "output_2": "b", "label": 0},
            "which output is better, 1 or 2",
        ),
        ("preference", {"prompt": "p", "chosen": "a", "rejected": "a"}, "chosen equals rejected"),
        ("preference", {"chosen": "abc", "rejected": "abcd"}, "beginning of the other"),
        (
            "feedback",
            {"prompt": "p", "completion": "c", "label": "maybe"},
            "label must be true or false, got 'maybe'",
        ),
        (
            "feedback",
            {"prompt": "p", "completion": "c", "label": None},
            "label must be true or false",
        ),
        ("feedback", {"prompt": "p", "completion": "c", "label": 2}, "label must be true or false"),
        ("labelled", {"text": "t", "label": None}, "label must be a class name"),
        ("labelled", {"text": "t", "label": 1.5}, "label must be a class name"),
    ],
)
def test_malformed_rows_say_why(kind, row, reason):
    with pytest.raises(RowError, match=reason):
        make_example(kind, 1, row)


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ([user("a"), assistant("b")], [user("a"), assistant("c")]),
        (
            [user("a"), assistant("b"), user("c"), assistant("d")],
            [user("a"), assistant("b"), user("c"), assistant("e")],
        ),
        ("The sky is blue.", "The sky is green."),
        ("The sky is bluish.", "The sky is blue."),
    ],
)
def test_implicit_prompts_are_those_of_trl(chosen, rejected):
    theirs = trl_extract_prompt({"chosen": chosen, "rejected": rejected})
    as_tuple = tuple if isinstance(chosen, list) else str
    ours = extract_prompt(as_tuple(chosen), as_tuple(rejected))
    assert ours == tuple(as_tuple(theirs[name]) for name in ("prompt", "chosen", "rejected"))


def test_plain_dialogues_are_cut_at_the_last_turn_they_share():
    start = "\n\nHuman: hi\n\nAssistant:"
    prompt, chosen, rejected = extract_prompt(start + " hello you", start + " hello there")
    assert (prompt, chosen, rejected) == (start, " hello you", " hello there")


def test_unrolling_pairs_is_that_of_trl():
    import datasets

    rows = [{"prompt": f"p{i}", "chosen": f"a{i}", "rejected": f"b{i}"} for i in range(4)]
    theirs = unpair_preference_dataset(datasets.Dataset.from_list(rows)).to_list()
    ours = unpair([make_example("preference", i, row) for i, row in enumerate(rows)])
    assert sorted((r["prompt"], r["completion"], r["label"]) for r in theirs) == sorted(
        (r.prompt, r.completion, r.desirable) for r in ours
    )


def test_renaming_and_templates():
    row = {"question": "why {x}?", "answer": "so", "site": "A"}
    columns = {"completion": "answer"}
    assert renamed(row, columns, "Q: {question} {{!}}") == {
        "question": "why {x}?",
        "site": "A",
        "completion": "so",
        "prompt": "Q: why {x}? {!}",
    }
    with pytest.raises(RowError, match="'answer' is missing"):
        renamed({"question": "x"}, columns, None)
    with pytest.raises(RowError, match="'nope' of the template is missing"):
        fill_template("{nope}", row)


def test_a_template_reads_columns_and_nothing_else():
    with pytest.raises(RowError, match="missing"):
        fill_template("{question.__class__}", {"question": "x"})


def test_long_texts_are_no_partition_columns():
    example = make_example(
        "labelled", 1, {"text": "t", "label": "x", "site": "A", "note": "n" * 500}
    )
    assert example.columns == {"site": "A"}


def test_two_outputs_and_which_is_better_are_a_pair():
    row = {"input": "Which?", "output_1": "this", "output_2": "that", "label": 2}
    pair = make_example("preference", 3, row)
    assert (pair.prompt, pair.chosen, pair.rejected) == ("Which?\n", "that", "this")
    row = {"instruction": "Do.", "input": "x", "output_1": "a", "output_2": "b", "label": 1}
    assert make_example("preference", 3, row).prompt == "Do.\n\nx\n"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "p", "chosen": "a", "rejected": None}, [("p", "a", True)]),
        ({"prompt": "p", "rejected": "b"}, [("p", "b", False)]),
        ({"prompt": "p", "chosen": "a", "rejected": "a"}, [("p", "a", True), ("p", "a", False)]),
        (
            {"chosen": "\n\nHuman: q\n\nAssistant: yes"},
            [("\n\nHuman: q\n\nAssistant:", " yes", True)],
        ),
    ],
)
def test_what_is_no_pair_becomes_single_answers(row, expected):
    found = pair_or_feedback(4, row)
    assert [(r.prompt, r.completion, r.desirable) for r in found] == expected
    assert all(r.row == 4 for r in found)


def test_a_single_answer_needs_a_prompt():
    with pytest.raises(RowError, match="no prompt"):
        pair_or_feedback(1, {"chosen": "just text"})
    with pytest.raises(RowError, match="chosen and rejected missing"):
        pair_or_feedback(1, {"prompt": "p"})


def test_several_accepted_answers():
    made = make_example("instruction", 1, {"prompt": "p", "completion": ["a", "b", "c"]})
    assert made == Instruction(1, "p", "a", accepted=("b", "c"))
    with pytest.raises(RowError, match="completion is empty"):
        make_example("instruction", 1, {"prompt": "p", "completion": ["", "b"]})
