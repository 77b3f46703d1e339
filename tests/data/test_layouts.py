"""Layouts that are recognised without a setting, in which order, and what is said where none is."""

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest

from fedloom.data.examples import Feedback, Instruction, Labelled, Preference
from fedloom.data.layouts import FAMILIES, LAYOUTS, recognise
from fedloom.data.loading import load_examples
from fedloom.data.public import text_of
from fedloom.data.row_parsing import Reading, make_example
from fedloom.data.rows import RowError
from fedloom.data.sources import DataSettings
from fedloom.errors import DataError

HUMAN, GPT = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}
USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
OTHER = {"role": "assistant", "content": "b"}
SO = {"chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("row", "name", "expected"),
    [
        # TRL's own columns are put together as they are; between others stands a line's end
        ({"prompt": "q", "completion": "a"}, "prompt/completion", Instruction(1, "q", "a")),
        ({"prompt": "q", "response": "a"}, "prompt/response", Instruction(1, "q\n", "a")),
        ({"prompt": "q", "output": "a"}, "prompt/output", Instruction(1, "q\n", "a")),
        ({"question": "q", "answer": "a"}, "question/answer", Instruction(1, "q\n", "a")),
        ({"question": "q ", "answer": "a"}, "question/answer", Instruction(1, "q ", "a")),
        ({"question": "q", "answer": " a"}, "question/answer", Instruction(1, "q", " a")),
        ({"question": "q", "response": "a"}, "question/response", Instruction(1, "q\n", "a")),
        ({"query": "q", "response": "a"}, "query/response", Instruction(1, "q\n", "a")),
        ({"question": "q", "completion": "a"}, "question/completion", Instruction(1, "q\n", "a")),
        ({"problem": "q", "solution": "a"}, "problem/solution", Instruction(1, "q\n", "a")),
        (
            {"input": "q", "output": ["a", "b"]},
            "input/output",
            Instruction(1, "q\n", "a", accepted=("b",)),
        ),
        (
            {"instruction": "do", "input": "q", "output": "a"},
            "instruction/input/output",
            Instruction(1, "do\n\nq\n", "a"),
        ),
        (
            {"instruction": "do", "input": "", "output": "a"},
            "instruction/input/output",
            Instruction(1, "do\n", "a"),
        ),
        ({"instruction": "do", "output": "a"}, "instruction/output", Instruction(1, "do\n", "a")),
        (
            {"instruction": "do", "context": "q", "response": "a", "category": "qa"},
            "instruction/context/response",
            Instruction(1, "do\n\nq\n", "a", {"category": "qa"}),
        ),
        ({"messages": [USER, ASSISTANT]}, "messages", Instruction(1, (USER,), (ASSISTANT,))),
        ({"conversations": [HUMAN, GPT]}, "conversations", Instruction(1, (USER,), (ASSISTANT,))),
        ({"text": "a"}, "text", Instruction(1, "", "a")),
    ],
)
def test_instructions(row, name, expected):
    assert recognise("instruction", list(row)).name == name
    assert make_example("instruction", 1, row) == expected


PAIR = Preference(1, "q\n", "a", "b")
TURNS = Preference(1, (USER,), (ASSISTANT,), (OTHER,))


@pytest.mark.parametrize(
    ("row", "name", "expected"),
    [
        ({"prompt": "q", **SO}, "prompt/chosen/rejected", Preference(1, "q", "a", "b")),
        ({"question": "q", **SO}, "question/chosen/rejected", PAIR),
        (
            {"instruction": "do", "input": "q", **SO},
            "instruction/input/chosen/rejected",
            Preference(1, "do\n\nq\n", "a", "b"),
        ),
        (
            {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
            "chosen/rejected",
            Preference(1, "\n\nHuman: q\n\nAssistant:", " a", " b"),
        ),
        (
            {"messages": [USER], "chosen": "a", "rejected": "b"},
            "messages/chosen/rejected",
            Preference(1, (USER,), (ASSISTANT,), ({"role": "assistant", "content": "b"},)),
        ),
        (
            {
                "persona": "p1",
                "question": "q",
                "answer_matching_behavior": " Yes",
                "answer_not_matching_behavior": " No",
            },
            "question/answer_matching_behavior/answer_not_matching_behavior",
            Preference(1, "q", " Yes", " No", {"persona": "p1"}),
        ),
        (
            {"Question": "q", "Best Answer": "a", "Incorrect Answers": "b; c"},
            "Question/Best Answer/Incorrect Answers",
            PAIR,
        ),
        (  # of what is not a list of answers all is kept
            {"Question": "q; r", "Best Answer": "a; b", "Incorrect Answers": "c; d"},
            "Question/Best Answer/Incorrect Answers",
            Preference(1, "q; r\n", "a; b", "c"),
        ),
        (  # beside conversations the prompt is a turn, without a line's end
            {"instruction": "q", "chosen": [USER, ASSISTANT], "rejected": [USER, OTHER]},
            "instruction/chosen/rejected",
            TURNS,
        ),
        (
            {"question": "q", "chosen": [ASSISTANT], "rejected": [OTHER]},
            "question/chosen/rejected",
            TURNS,
        ),
        (
            {"question": "q", "chosen": "a", "rejected": [OTHER]},
            "question/chosen/rejected",
            TURNS,
        ),
        (
            {"question": "q", "responses": [[OTHER], [ASSISTANT]], "best": 1},
            "question/responses/best",
            Preference(1, (USER,), (ASSISTANT,), (OTHER,), {"best": "1"}),
        ),
        (
            {"input": "q", "output_1": "b", "output_2": "a", "label": 2},
            "input/output_1/output_2/label",
            Preference(1, "q\n", "a", "b", {"label": "2"}),
        ),
        (
            {"instruction": "q", "output_1": "a", "output_2": "b", "preference": 1.0},
            "instruction/output_1/output_2/preference",
            Preference(1, "q\n", "a", "b", {"preference": "1.0"}),
        ),
        (
            {"prompt": "q", "response_a": "b", "response_b": "a", "winner": "model_b"},
            "prompt/response_a/response_b/winner",
            Preference(1, "q\n", "a", "b", {"winner": "model_b"}),
        ),
        (
            {"prompt": "q", "response_0": "b", "response_1": "a", "better_response_id": 1},
            "prompt/response_0/response_1/better_response_id",
            Preference(1, "q\n", "a", "b", {"better_response_id": "1"}),
        ),
        (
            {"query": "q", "answer_1": "b", "answer_2": "a", "score_1": 0.2, "score_2": 0.9},
            "query/answer_1/answer_2/score_1/score_2",
            Preference(1, "q\n", "a", "b", {"score_1": "0.2", "score_2": "0.9"}),
        ),
        (
            {
                "instruction": "q",
                "input": "",
                "response1": "a",
                "response2": "b",
                "annotator1": 1,
                "annotator2": 0,
                "annotator3": 1,
            },
            "instruction/input/response1/response2/annotator1/annotator2/annotator3",
            Preference(
                1, "q\n", "a", "b", {"annotator1": "1", "annotator2": "0", "annotator3": "1"}
            ),
        ),
        (
            {"prompt": "q", "responses": ["b", "a"], "chosen": 1},
            "prompt/responses/chosen",
            PAIR,
        ),
        (
            {"question": "q", "choices": ["b", "c", "a"], "best": 2},
            "question/choices/best",
            Preference(1, "q\n", "a", "b", {"best": "2"}),
        ),
        (
            {"prompt": "q", "completions": ["c", "a", "b"], "scores": [2, 3, 1]},
            "prompt/completions/scores",
            PAIR,
        ),
    ],
)
def test_preferences(row, name, expected):
    assert recognise("preference", list(row)).name == name
    assert make_example("preference", 1, row) == expected


@pytest.mark.parametrize(
    ("row", "name", "expected"),
    [
        (
            {"prompt": "q", "completion": "a", "label": True},
            "prompt/completion/label",
            Feedback(1, "q", "a", True),
        ),
        (
            {"prompt": "q", "completion": "a", "final_label": "good"},
            "prompt/completion/final_label",
            Feedback(1, "q", "a", True, {"final_label": "good"}),
        ),
        (
            {"question": "q", "answer": "a", "thumbs": "👎"},
            "question/answer/thumbs",
            Feedback(1, "q\n", "a", False, {"thumbs": "👎"}),
        ),
        (
            {"instruction": "q", "input": "", "output": "a", "kto_tag": False},
            "instruction/input/output/kto_tag",
            Feedback(1, "q\n", "a", False, {"kto_tag": "False"}),
        ),
        (
            {"conversations": [HUMAN, GPT], "kto_tag": True},
            "conversations/kto_tag",
            Feedback(1, (USER,), (ASSISTANT,), True, {"kto_tag": "True"}),
        ),
        (
            {"messages": [USER, ASSISTANT], "label": "👍"},
            "messages/label",
            Feedback(1, (USER,), (ASSISTANT,), True),
        ),
    ],
)
def test_feedback(row, name, expected):
    assert recognise("feedback", list(row)).name == name
    assert make_example("feedback", 1, row) == expected


@pytest.mark.parametrize("column", ["label", "labels", "category", "intent"])
@pytest.mark.parametrize("label", ["x", 3])
def test_labelled(column, label):
    kept = {} if column == "label" else {column: str(label)}  # to divide clients by
    expected = Labelled(1, "t", str(label), kept)
    assert make_example("labelled", 1, {"text": "t", column: label}) == expected


def test_the_order_is_that_of_the_table_and_the_choice_is_told():
    row = ["instruction", "input", "output", "text"]
    assert str(recognise("instruction", row)) == (
        "layout instruction/input/output (text would fit as well)"
    )
    assert str(recognise("preference", ["prompt", "chosen", "rejected", "messages"])) == (
        "layout prompt/chosen/rejected (messages/chosen/rejected would fit as well)"
    )
    assert str(recognise("instruction", ["input", "output"])) == "layout input/output"


def test_what_settings_name_comes_first():
    there = ["prompt", "completion", "chosen", "rejected", "question", "answer"]
    assert recognise("instruction", there).name == "prompt/completion"
    assert recognise("instruction", there, ["question", "answer"]).name == "question/answer"
    row = ["instruction", "input", "output", "prompt"]  # a template has made the prompt
    assert recognise("instruction", row, ["prompt"]).name == "prompt/output"


def test_every_kind_has_a_table_and_no_layout_stands_there_twice():
    assert set(LAYOUTS) == {"instruction", "preference", "feedback", "labelled"} == set(FAMILIES)
    for layouts in LAYOUTS.values():
        assert len({layout.parts for layout in layouts}) == len(layouts)
        assert len({layout.name() for layout in layouts}) == len(layouts)


def test_the_guide_names_every_column():
    guide = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    for layouts in LAYOUTS.values():
        for layout in layouts:
            for name in (*layout.columns.values(), *layout.optional):
                assert f"`{name}`" in guide, name


# --- files --------------------------------------------------------------------------------------


def load(path, rows, kind, **settings):
    path.write_text("\n".join(map(json.dumps, rows)))
    own = DataSettings(source=str(path), kind=kind, **settings)
    assert own.contradictions() == []
    return load_examples(own, np.random.default_rng(0))


def said(path, rows, kind, **settings):
    with pytest.raises(DataError) as caught:
        load(path, rows, kind, **settings)
    return str(caught.value)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "x.jsonl"


def test_each_source_has_its_line(tmp_path):
    for name in ("a", "b"):
        rows = [{"question": f"q{i}", "answer": "a"} for i in range(4)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "c.jsonl").write_text('{"text": "t"}\n')
    own = DataSettings(source=str(tmp_path / "*.jsonl"), kind="instruction")
    data = load_examples(own, np.random.default_rng(0))
    assert data.layouts == (
        "a.jsonl and 1 more: layout question/answer",
        "c.jsonl: layout text",
    )


def test_a_row_without_the_files_columns_is_malformed_and_not_guessed_anew(path):
    rows = [{"question": f"q{i}", "answer": "a"} for i in range(30)] + [{"text": "t"}]
    data = load(path, rows, "instruction")
    assert [str(row) for row in data.bad_rows] == ["x.jsonl row 31: question and answer missing"]


def test_one_odd_row_at_the_start_hides_no_layout(path):
    rows = [{"note": "made in May"}] + [{"question": f"q{i}", "answer": "a"} for i in range(30)]
    data = load(path, rows, "instruction")
    assert data.layouts == ("x.jsonl: layout question/answer",) and len(data.bad_rows) == 1


def test_the_layout_is_that_of_most_rows(path):
    rows = [{"completion": "x"}] + [{"prompt": f"p{i}", "completion": "c"} for i in range(30)]
    data = load(path, rows, "instruction")
    assert data.layouts == ("x.jsonl: layout prompt/completion",)
    assert [str(row) for row in data.bad_rows] == ["x.jsonl row 1: prompt missing"]
    assert {row.prompt for row in [*data.train, *data.test]} == {f"p{i}" for i in range(30)}


def test_prompts_that_few_rows_have_are_told_of(path):
    rows = [{"completion": f"x{i}"} for i in range(30)] + [{"prompt": "p", "completion": "c"}] * 9
    data = load(path, rows, "instruction")
    assert data.layouts == (
        "x.jsonl: layout completion (in some rows prompt/completion would fit as well)",
    )


@pytest.mark.parametrize("turned", [1, -1])
def test_of_two_layouts_with_as_many_rows_the_first_of_the_table_is_taken(path, turned):
    layouts = [{"text": "t"}, {"question": "q", "answer": "a"}, {"prompt": "p", "completion": "c"}]
    rows = [{key: f"{text}{i}" for key, text in row.items()} for i in (1, 2) for row in layouts]
    rows = [*rows[::turned], {"text": "t3"}]
    data = load(path, rows, "instruction", max_bad_share=0.8)
    assert data.layouts == ("x.jsonl: layout text",)
    data = load(path, rows[:6], "instruction", max_bad_share=0.8)
    assert data.layouts == ("x.jsonl: layout prompt/completion",)


def test_messages_name_the_users_own_columns(path):
    rows = [{"ask": f"q{i}", "reply": 3 if i else "a"} for i in range(5)]
    text = said(path, rows, "instruction", columns={"prompt": "ask", "completion": "reply"})
    assert "x.jsonl row 2: reply must be text, got 3" in text
    rows = [{"ask": "q", "x": "a", "y": "b", "who": "z"}] * 5
    columns = {"question": "ask", "output_1": "x", "output_2": "y", "label": "who"}
    text = said(path, rows, "preference", columns=columns, max_bad_share=0.1)
    assert text.startswith("x.jsonl: 'who' is not understood in 5 of 5 rows; it holds 'z' (5).")
    columns["rating"] = columns.pop("label")
    text = said(path, rows, "feedback", columns={"question": "ask", "answer": "x", "rating": "who"})
    assert text.startswith("x.jsonl: 'who' is not understood in 5 of 5 rows; it holds 'z' (5).")


def test_scores_are_named_as_the_user_names_them_with_the_wrong_one(path):
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b", "good": 3, "bad": "?"}] * 5
    columns = {"score_chosen": "good", "score_rejected": "bad"}
    text = said(path, rows, "preference", columns=columns, min_margin=1.0)
    assert "x.jsonl row 1: good and bad must be numbers, got '?'" in text


def test_the_line_to_paste_is_of_the_section_of_its_domain(path):
    path.write_text("\n".join(map(json.dumps, rated(["full", "refusal"] * 9))))
    own = DataSettings(domains={"care": {"source": str(path)}}, kind="feedback")
    with pytest.raises(
        DataError, match=r"say it in \[data\.domains\.care\], such as\n  values = \{"
    ):
        load_examples(own, np.random.default_rng(0))


def test_an_input_that_some_rows_lack_is_still_read(path):
    rows = [{"instruction": "do", "output": "a"}] * 5
    rows += [{"instruction": "do", "input": "this", "output": "a"}] * 5
    data = load(path, rows, "instruction")
    prompts = {row.prompt for row in [*data.train, *data.test]}
    assert prompts == {"do\n", "do\n\nthis\n"}


def test_a_template_is_the_prompt_as_it_is(path):
    rows = [{"question": f"q{i}", "answer": "a"} for i in range(5)]
    data = load(path, rows, "instruction", template="Q: {question} A:")
    assert data.layouts == ("x.jsonl: layout prompt/answer",)
    assert {row.prompt for row in data.train} <= {f"Q: q{i} A:" for i in range(5)}


def test_where_none_fits_the_columns_the_layouts_and_the_setting_are_named(path):
    text = said(path, [{"before": "a", "after": "b"}] * 3, "preference")
    assert text.startswith("x.jsonl fits no layout of preference data; it has: after, before.\n")
    assert (
        'data.columns, such as { prompt = "YOUR COLUMN" }, or make the prompt with data.tem' in text
    )
    assert (
        "\n  prompt + chosen+rejected\n" in text and "PROMPT: prompt, instruction (+input/" in text
    )
    assert "data.kind" not in text


def test_another_kind_that_fits_is_named(path):
    text = said(path, [{"prompt": "p", "chosen": "a", "rejected": "b"}] * 3, "instruction")
    assert "x.jsonl has no column 'completion'; it has: chosen, prompt, rejected." in text
    assert (
        'These columns read as preference data (prompt/chosen/rejected): data.kind = "preference"'
    ) in text


def test_the_setting_of_the_held_out_rows_is_named_for_them(path, tmp_path):
    (tmp_path / "y.jsonl").write_text('{"question": "q", "answer": "a"}')
    text = said(
        path,
        [{"prompt": "p", "chosen": "a", "rejected": "b"}] * 3,
        "preference",
        test_source=str(tmp_path / "y.jsonl"),
        test_kind="feedback",
    )
    assert "y.jsonl has no column 'label'" in text and 'data.test_kind = "instruction"' in text


def test_no_row_brings_anything_but_its_reason():
    rng = np.random.default_rng(0)
    call = {"role": "assistant", "content": None, "tool_calls": [{}]}
    values = [None, "", " ", "a", 0, 2, -1, 1.5, float("nan"), 10**400, True, [], {}, ["a", "b"]]
    values += [[None], [[]], "[{", "{}", "1e999", [call], [{"role": []}], [{"from": "gpt"}]]
    values += [[{"role": "assistant", "content": c}] for c in ("x", [], {}, [{"type": []}], 3)]
    kinds = list(LAYOUTS)
    for _ in range(4000):
        kind = kinds[rng.integers(len(kinds))]
        layout = LAYOUTS[kind][rng.integers(len(LAYOUTS[kind]))]
        names = [*layout.columns.values(), *layout.optional, "tools", "system", "images"]
        row = {name: values[rng.integers(len(values))] for name in names}
        reading = Reading(layout, {}, [None, 1.0][rng.integers(2)])
        with contextlib.suppress(RowError):
            assert text_of(make_example(kind, 1, row, reading)).strip()


def test_where_all_rows_fail_alike_the_advice_is_about_a_setting(path):
    rows = [
        {"prompt": "p", "completion": {"a": i}, "chosen": "a", "rejected": "b"} for i in range(40)
    ]
    text = said(path, rows, "instruction")
    assert "40 of 40 rows of x.jsonl are malformed (100.0%)" in text
    assert text.endswith('these rows read as preference data: data.kind = "preference"')
    text = said(path, [{"question": 3, "answer": 4}] * 40, "instruction")
    assert (
        "nearly all rows fail alike, so it is a setting that is wrong rather than the rows" in text
    )
    assert text.endswith("The columns are answer, question") and "mend these" not in text


# --- labels -------------------------------------------------------------------------------------


def rated(values):
    return [
        {"prompt": f"p{i}", "completion": f"c{i}", "label": value} for i, value in enumerate(values)
    ]


def test_a_scale_names_the_setting_with_the_values_found_and_a_line_to_paste(path):
    assert said(path, rated([1, 2, 3, 4, 5] * 90), "feedback") == (
        "x.jsonl: 'label' is not understood in 360 of 450 rows; it holds '1' (90), '2' (90), '3' (90), "
        "'4' (90), '5' (90). What is desirable or undesirable is not guessed; say it in [data], such as\n"
        '  values = { desirable = ["> 3"], undesirable = ["< 3"] }\n'
        "rows with other values are then dropped and counted"
    )


def test_a_scale_is_told_however_few_rows_show_that_it_is_one(path):
    assert "'1' (98), '4' (1), '5' (1)" in said(path, rated([1] * 98 + [4, 5]), "feedback")
    assert len(load(path, rated([1, 0] * 49 + [7]), "feedback").bad_rows) == 1  # a slip


def test_words_name_the_setting(path):
    text = said(path, rated(["full", "refusal", "full"] * 10), "feedback")
    assert "'full' (20), 'refusal' (10)" in text
    assert '\n  values = { desirable = ["full"], undesirable = ["refusal"] }\n' in text


def test_the_line_that_was_pasted_is_heeded(path):
    values = {"desirable": ["> 3"], "undesirable": ["< 3"]}
    data = load(path, rated([1, 2, 3, 4, 5] * 20), "feedback", values=values)
    rows = [*data.train, *data.test]
    assert (sum(row.desirable for row in rows), len(rows)) == (40, 80)
    assert data.dropped == {"label is not among data.values": 20}


def test_values_that_nothing_has(path):
    text = said(path, rated(["x", "y"] * 5), "feedback", values={"desirable": ["z"]})
    assert text.endswith(
        "holds no usable row (dropped: 10 label is not among data.values); the values that there are: "
        "'x' (5), 'y' (5)"
    )


def judged(labels):
    return [
        {"prompt": f"p{i}", "output_1": "a", "output_2": "b", "label": label}
        for i, label in enumerate(labels)
    ]


def test_a_verdict_in_words_names_the_setting(path):
    text = said(path, judged(["left", "right", "none"] * 4), "preference")
    assert "'label' is not understood in 12 of 12 rows" in text
    assert 'values = { first = ["left"], second = ["none"] }' in text
    values = {"first": ["left"], "second": ["right"], "tie": ["none"]}
    data = load(path, judged(["left", "right", "none"] * 4), "preference", values=values)
    assert sorted(row.chosen for row in [*data.train, *data.test]) == ["a"] * 4 + ["b"] * 4
    assert data.dropped == {"tie between the answers": 4}


def test_places_counted_from_1_are_not_guessed(path):
    rows = [{"prompt": f"p{i}", "responses": ["a", "b"], "best": 1 + i % 2} for i in range(10)]
    assert "'best' is not understood in 5 of 10 rows; it holds '1' (5), '2' (5)" in said(
        path, rows, "preference"
    )
    data = load(path, rows, "preference", values={"first": ["1"], "second": ["2"]})
    assert sorted(row.chosen for row in [*data.train, *data.test]) == ["a"] * 5 + ["b"] * 5


def test_a_margin_between_scores(path):
    rows = [
        {"prompt": f"p{i}", "chosen": "a", "rejected": "b", "score_chosen": i, "score_rejected": 2}
        for i in range(10)
    ]
    data = load(path, rows, "preference", min_margin=3.0)
    assert sorted(row.row for row in [*data.train, *data.test]) == [6, 7, 8, 9, 10]
    assert data.dropped == {"scores closer than data.min_margin = 3": 5}
    assert not load(path, rows, "preference").dropped
    text = said(
        path, [{"prompt": "p", "chosen": "a", "rejected": "b"}], "preference", min_margin=1.0
    )
    assert text.startswith("x.jsonl has no scores for data.min_margin = 1; name their columns")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kind": "feedback", "values": {"good": ["5"]}}, "data.values.good: unknown key"),
        ({"kind": "feedback", "min_margin": 1.0}, "data.min_margin is for preferences with scores"),
        (
            {"source": "builtin:feedback", "values": {"desirable": ["5"]}},
            "are for rows that are read",
        ),
    ],
)
def test_settings_of_labels_that_contradict(settings, words):
    found = DataSettings(**{"source": "x.jsonl", **settings}).contradictions()
    assert any(words in text for text in found)


def test_a_row_of_no_layout_says_so():
    with pytest.raises(RowError, match="no layout of labelled data: a, b"):
        make_example("labelled", 1, {"a": 1, "b": 2})
