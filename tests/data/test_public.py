"""Public rows: taken or read, never shared with what is judged, and as the task needs them."""

import numpy as np
import pytest

from fedloom.data.examples import Instruction, Labelled, Preference
from fedloom.data.public import PublicSettings, as_task, take_public, text_of
from fedloom.errors import DataError, SettingsError
from fedloom.runs.assembly import assemble
from fedloom.runs.partitioning import partition_data

CLASSES = ("loss", "theft")
METHOD = {"method": {"name": "distillation"}, "objective": {"name": "classification"}}


def labelled(count, start=0, label="loss"):
    return [Labelled(i, f"text {i + start}", label) for i in range(count)]


def test_rows_that_are_taken_leave_the_clients_and_are_not_judged():
    train, test = labelled(20), labelled(5, start=15)
    public, left = take_public(train, test, PublicSettings(rows=8), np.random.default_rng(0))
    assert len(public) == 8 and len(left) == 12
    assert sorted(row.row for row in [*public, *left]) == list(range(20))
    assert not {text_of(row) for row in public} & {text_of(row) for row in test}
    with pytest.raises(DataError, match="there are 15 training rows to take them from"):
        take_public(train, test, PublicSettings(rows=16), np.random.default_rng(0))


def test_labels_are_kept_only_where_they_may_be_learnt_from():
    assert [row.label for row in as_task(labelled(2), CLASSES, labelled=True)] == ["loss"] * 2
    assert [row.label for row in as_task(labelled(2), CLASSES, labelled=False)] == [""] * 2
    story = Instruction(3, "Once ", "upon a time")
    (row,) = as_task([story], CLASSES, labelled=False)
    assert row == Labelled(3, "Once upon a time", "")
    with pytest.raises(
        DataError, match="public row 0 has the class 'fire', which is none of the 2"
    ):
        as_task(labelled(1, label="fire"), CLASSES, labelled=True)
    with pytest.raises(DataError, match="has the class ''"):
        as_task([story], CLASSES, labelled=True)


def test_for_a_causal_model_a_text_is_all_completion():
    (row,) = as_task(labelled(1), (), labelled=False)
    assert (row.prompt, row.completion) == ("", "text 0")
    (row,) = as_task([Preference(1, "Q", "good", "bad")], (), labelled=False)
    assert (row.prompt, row.completion) == ("Q", "good")


@pytest.fixture
def files(rows_file):
    rows = [{"text": f"question {i}", "label": CLASSES[i % 2]} for i in range(40)]
    test = [{"text": f"asked {i}", "label": CLASSES[i % 2]} for i in range(10)]
    return rows_file(rows, "train.jsonl"), rows_file(test, "test.jsonl")


def sections(files, **public):
    data = {"source": files[0], "test_source": files[1], "kind": "labelled"}
    return {**METHOD, "data": data, "public": {"rows": 6, **public}}


def test_a_source_of_another_domain_without_labels(experiment, files, rows_file):
    stories = rows_file([{"body": f"a story {i}"} for i in range(30)], "stories.jsonl")
    more = {"source": stories, "kind": "instruction", "columns": {"text": "body"}}
    division = partition_data(experiment(**sections(files, **more)))
    assert len(division.public) == 6
    assert all(row.text.startswith("a story") and row.label == "" for row in division.public)
    assert sum(len(rows) for rows in division.train.values()) > 30  # nothing was taken from clients


def test_a_source_that_shares_rows_with_the_held_out_set(experiment, files, rows_file):
    rows = [{"text": f"asked {i}", "label": "loss"} for i in (3, 4)]
    rows += [{"text": f"new {i}", "label": "loss"} for i in range(20)]
    source = rows_file(rows, "public.jsonl")
    with pytest.raises(DataError, match="shares 2 of its 22 rows with the held-out set"):
        partition_data(experiment(**sections(files, source=source, kind="labelled")))


def test_texts_are_compared_as_everywhere(experiment, files, rows_file):
    """Without regard to case, width and white space, and across kinds of rows."""
    for text in ("ASKED  3 ", "asked 3", "asked\n3"):
        rows = [{"text": text, "label": "loss"}]
        rows += [{"text": f"new {i}", "label": "loss"} for i in range(20)]
        source = rows_file(rows, "public.jsonl")
        for kind in ("labelled", "instruction"):
            columns = {} if kind == "labelled" else {"text": "text"}
            with pytest.raises(DataError, match="shares 1 of its 21 rows"):
                partition_data(
                    experiment(**sections(files, source=source, kind=kind, columns=columns))
                )


def test_rows_that_are_taken_are_compared_alike():
    train = [Labelled(0, "Hello ", "loss"), *labelled(6, start=20)]
    public, _ = take_public(
        train, [Labelled(0, "hello", "loss")], PublicSettings(rows=5), np.random.default_rng(0)
    )
    assert "Hello " not in {text_of(row) for row in public}
    with pytest.raises(DataError, match="there are 6 training rows"):
        take_public(
            train, [Labelled(0, "hello", "loss")], PublicSettings(rows=6), np.random.default_rng(0)
        )


CAUSAL = {"method": {"name": "distillation"}, "objective": {"name": "sft"}}


def asks(prompts, **more):
    return [{"prompt": p, "completion": f"c{i}", **more} for i, p in enumerate(prompts)]


def test_prompts_and_groups_are_compared_too(experiment, rows_file):
    wards = [
        {**row, "ward": f"A{i % 8}"} for i, row in enumerate(asks(map("own {}".format, range(40))))
    ]
    train = rows_file(wards, "train.jsonl")
    test = rows_file([{**row, "ward": "B"} for row in asks(["Why?"] * 2)], "test.jsonl")
    new = asks([f"new {i}" for i in range(20)])
    for more, message in (
        (asks(["why? "]), "shares 1 of its 21 rows"),
        ([{**row, "ward": "B"} for row in asks(["fresh", "other"])], "shares 2 of its 22 rows"),
        (
            [{**row, "ward": "C", "completion": "So."} for row in asks(["Why?"])],
            None,
        ),  # another ward's
    ):
        public = [{"ward": "-", **row} for row in [*new, *more]]
        if message == "shares 1 of its 21 rows":
            public = [{k: v for k, v in row.items() if k != "ward"} for row in public]
        data = {"source": train, "test_source": test, "kind": "instruction", "group": "ward"}
        own = {"source": rows_file(public, "public.jsonl"), "kind": "instruction", "rows": 5}
        asked = experiment(**CAUSAL, data=data, public=own)
        if message is None:
            assert len(partition_data(asked).public) == 5
        else:
            with pytest.raises(DataError, match=message):
                partition_data(asked)


def test_one_prompt_for_all_says_nothing(experiment, rows_file):
    """Then only rows that are equal are shared, and a warning says how many prompts are."""
    train = rows_file(asks(["Say it"] * 40), "train.jsonl")
    test = rows_file([{"prompt": "Say it", "completion": f"t{i}"} for i in range(4)], "test.jsonl")
    rows = [{"prompt": "say  it", "completion": f"p{i}"} for i in range(9)]
    data = {"source": train, "test_source": test, "kind": "instruction"}
    own = {"kind": "instruction", "rows": 5, "source": rows_file(rows, "public.jsonl")}
    found = partition_data(experiment(**CAUSAL, data=data, public=own))
    assert len(found.public) == 5
    assert any(
        text.startswith("9 of the 9 rows of public.source") for text in found.accounts.warnings
    )
    rows[0]["completion"] = "T1 "
    own["source"] = rows_file(rows, "public.jsonl")
    with pytest.raises(DataError, match="shares 1 of its 9 rows"):
        partition_data(experiment(**CAUSAL, data=data, public=own))


@pytest.mark.parametrize("ward", [{}, {"ward": "ours"}], ids=["without", "with"])
def test_no_client_is_judged_by_a_public_row(experiment, rows_file, ward):
    """One that has no group (data.group) is told from the others by its prompt."""
    rows = [{**row, "ward": f"w{i // 4}"} for i, row in enumerate(asks(map(str, range(80))))]
    test = rows_file([{**row, "ward": "test"} for row in asks(["one", "two"])], "test.jsonl")
    source = rows_file([{**row, **ward} for row in asks(map(str, range(0, 60, 4)))], "public.jsonl")
    data = {"source": rows_file(rows), "test_source": test, "kind": "instruction", "group": "ward"}
    asked = experiment(
        **CAUSAL,
        data=data,
        public={"source": source, "kind": "instruction", "rows": 15},
        partition={"client_test_fraction": 0.2},
        federation={"clients": 1},
    )
    held = partition_data(asked).held_out[0]
    assert held
    if not ward:
        assert {row.columns["ward"] for row in held} <= {f"w{i}" for i in range(15, 20)}


def test_an_empty_source(experiment, files, rows_file):
    with pytest.raises(DataError):
        partition_data(
            experiment(**sections(files, source=rows_file([], "none.jsonl"), kind="labelled"))
        )


def test_public_rows_are_read_as_their_section_says(experiment, files, rows_file):
    rows = [{"prompt": f"q {i}", "completion": "a", "label": i > 0} for i in range(8)]
    rows += [{"prompt": "q 0", "completion": "a", "label": True}]  # and false in the first row
    source = rows_file(rows, "public.jsonl")
    for ambiguous, count in (("drop", 7), ("keep", 9)):
        more = {"source": source, "kind": "feedback", "ambiguous": ambiguous, "rows": 9}
        own = sections(files, **more)
        own["data"] |= {"ambiguous": "keep" if ambiguous == "drop" else "drop"}
        assert len(partition_data(experiment(**own)).public) == count
    with pytest.raises(SettingsError, match=r"public\.ambiguous is of public\.source"):
        experiment(**sections(files, ambiguous="keep"))


def test_control_tokens_of_public_rows(experiment, files, rows_file):
    """In public rows they are what [public] says, whatever [data] says of other rows."""
    source = rows_file([{"text": f"a </s> b {i}"} for i in range(8)], "public.jsonl")
    counts = {}
    for control, data in (("text", "control"), ("control", "text")):
        more = {"source": source, "kind": "instruction", "control_tokens": control}
        own = sections(files, **more)
        own["data"] |= {"control_tokens": data}
        asked = experiment(**own)
        parts = assemble(asked, partition_data(asked))
        tokens = parts.local.resources[0].public.share.tokens
        end = parts.encoder.tokenizer.eos_token_id
        counts[control] = [tokens.sequence(i)[0].tolist().count(end) for i in range(len(tokens))]
    assert counts["control"] == [1 + n for n in counts["text"]]
    asked = experiment(**sections(files, source=source, kind="instruction", max_length=5))
    tokens = assemble(asked, partition_data(asked)).local.resources[0].public.share.tokens
    assert max(tokens.lengths) == 5


def test_methods_without_need_have_no_public_rows(experiment, files):
    division = partition_data(experiment(**{**sections(files), "method": {"name": "fedavg"}}))
    assert division.public == ()
