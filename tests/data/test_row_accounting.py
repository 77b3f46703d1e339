"""Accounts of rows: they close, or say by how much they do not; what max_length cuts is counted."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedloom.data.examples import Instruction, Labelled, Preference
from fedloom.data.row_accounting import Account, Accounts, Cut, cut_of, cut_warnings, cuts_of
from fedloom.data.tokenize import tokenize
from fedloom.errors import DataError
from fedloom.evaluation.generate import load_encoder
from fedloom.reports import row_account
from fedloom.runs.assembly import assemble
from fedloom.runs.code_digests import MadeWith
from fedloom.runs.partitioning import partition_data
from fedloom.runs.records import SIMULATION, run_record


def test_an_account_closes_or_says_what_is_missing():
    own = Account(10, made={"x": 3}, malformed=1, dropped={"why": 2}, public=1, trained=4, held_out=3, judged=2)  # fmt: skip
    assert own.closes and own.difference == 0
    assert not Account(10, trained=9).closes and Account(10, trained=9).difference == 1
    assert not Accounts(Account(1, trained=1), clients={0: Account(2, trained=1)}).closes
    record = Account(10, trained=9).to_record()
    assert record["unaccounted"] == 1 and ("unaccounted for", "1") in row_account.lines(record)


def test_an_account_in_words():
    own = Account(4000, {"a": 20}, 12, {"b": 100, "c": 8}, 0, 3320, 330, 250).to_record()
    assert row_account.sentence("rows", own) == (
        "rows: 4\u202f000 read + 20 made of them = 12 malformed + 108 dropped + 3\u202f320 trained on + 330 held out "
        "by clients + 250 held out for all"
    )
    assert row_account.lines(own) == [
        ("read", "4\u202f000"), ("a", "+20"), ("malformed", "12"), ("dropped: b", "100"), ("dropped: c", "8"),
        ("trained on", "3\u202f320"), ("held out by clients", "330"), ("held out for all", "250"),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def encoder(model_folder):
    return load_encoder(str(model_folder))


def ids(encoder, text):
    return len(encoder.tokenizer(text)["input_ids"])


def test_what_is_cut_is_counted_by_row(encoder):
    long, short = " where is the key" * 20, "where?"
    rows = [
        Instruction(1, long, " here"),
        Instruction(2, short, " here"),
        Instruction(3, short, long),
    ]
    tokens = tokenize(rows, encoder, 24)
    found = cut_of(tokens)
    one = ids(encoder, long + " here") + 1 - 24
    end = ids(encoder, short + long) - ids(encoder, short) + 1
    assert (found.rows, found.prompt_rows, found.completion_rows, found.cut_rows) == (3, 2, 1, 2)
    assert found.completion_tokens == end - 23  # one token of the prompt stays before it
    assert found.prompt_tokens == one + ids(encoder, short) - 1
    assert found.share == pytest.approx(2 / 3)
    first, none, others = cuts_of(tokens, np.array([0, 1, 1, 3]))
    assert first == Cut(1, 1, 0, 1, one, 0) == cut_of(tokens.part(0, 1)) and none == Cut()
    assert first + others == found and others == cut_of(tokens.take(np.array([1, 2])))


def test_a_pair_is_one_row_and_its_prompt_is_cut_once(encoder):
    long = " where is the key" * 20
    alone = cut_of(tokenize([Instruction(1, long, " here")], encoder, 24))
    pair = cut_of(tokenize([Preference(1, long, " here", " her")], encoder, 24))
    assert (pair.rows, pair.cut_rows, pair.prompt_rows) == (1, 1, 1)
    assert abs(pair.prompt_tokens - alone.prompt_tokens) <= 3
    assert cut_of(tokenize([], encoder, 24)) == Cut()


def test_above_five_in_a_hundred_rows_it_is_warned_of():
    def told(all_rows, kind="instruction", **clients):
        own = {int(c[1:]): Account(0, cut=cut) for c, cut in clients.items()}
        return cut_warnings(Accounts(Account(0, cut=all_rows), clients=own), kind, 96)

    assert told(Cut(100, 5, 0, 5, 50, 0)) == [] == told(None)
    assert told(Cut(1000, 60, 3, 61, 5000, 12)) == [
        "96 tokens are too few for 61 of 1\u202f000 training rows (6.1%): 5\u202f000 tokens from the beginning of 60 "
        "prompts and 12 tokens from the end of the answers of 3 rows are cut; raise data.max_length as far "
        "as the model and memory allow"
    ]
    (text,) = told(Cut(100, 3, 0, 3, 30, 0), c1=Cut(20, 3, 0, 3, 30, 0), c2=Cut(80, 0, 0, 0, 0, 0))
    assert text.startswith(
        "96 tokens are too few for 3 of 100 training rows, of client 1 (15%) above all (3.0%): 30 tokens"
    )
    (text,) = told(Cut(10, 2, 0, 2, 9, 0), "labelled")
    assert "9 tokens from the end of 2 texts are cut" in text


def rows_of(count, long):
    words = "where is the key of the old cupboard " * 12
    return [
        {"prompt": f"{words if i in long else ''}{i}?", "completion": f" place {i}"}
        for i in range(count)
    ]


def test_cut_and_lost_rows_of_a_run_are_in_its_accounts(experiment, rows_file):
    built = experiment(
        data={
            "source": rows_file(rows_of(80, range(0, 80, 4))),
            "kind": "instruction",
            "max_length": 40,
        },
        objective={"name": "sft"},
        federation={"clients": 2},
    )
    division = partition_data(built)
    parts = assemble(built, division)
    accounts = parts.accounts
    assert accounts.closes and accounts.source.trained == sum(parts.engine.sizes().values())
    long = {c: sum(len(r.prompt) > 20 for r in rows) for c, rows in division.train.items()}
    assert {c: own.cut.prompt_rows for c, own in accounts.clients.items()} == long
    assert accounts.source.cut.prompt_rows == sum(long.values()) > 4
    held = [*division.test, *(row for rows in division.held_out.values() for row in rows)]
    assert accounts.source.held_out_cut.prompt_rows == sum(len(r.prompt) > 20 for r in held)
    assert accounts.source.held_out_cut.rows == len(held)
    (text,) = accounts.warnings
    assert text.startswith(
        f"40 tokens are too few for {sum(long.values())} of {accounts.source.trained} "
    )


def test_rows_that_no_template_takes_are_malformed(experiment, rows_file, monkeypatch):
    """As many as data.max_bad_share allows are left out; of more the first are named."""
    from fedloom.data.token_set import TokenSet, Untokenized
    from fedloom.runs import token_rows

    def picky(rows, encoder, max_length, classes=(), cache=None, *, keep_alike=False):
        whole = tokenize(rows, encoder, max_length, classes)
        bad = [p for p in range(len(whole)) if rows[int(whole.index[p])].row in refused]
        lost = [Untokenized(p, rows[p].row, "no turn of a user", True) for p in bad]
        kept = [p for p in range(len(whole)) if p not in bad]
        taken: TokenSet = whole.take(whole.index[kept])
        return type(whole)(**{**vars(taken), "dropped": tuple(lost)})

    monkeypatch.setattr(token_rows, "tokenize", picky)
    path = rows_file(rows_of(80, ()))
    built = experiment(
        data={"source": path, "kind": "instruction"},
        objective={"name": "sft"},
        federation={"clients": 2},
    )
    division = partition_data(built)
    refused = {division.train[0][3].row, division.train[1][0].row, division.test[2].row}
    refused.add(division.held_out[1][0].row)
    parts = assemble(built, division)
    accounts = parts.accounts
    assert accounts.closes and accounts.source.malformed == 4 and accounts.malformed == 4
    assert [own.malformed for own in accounts.clients.values()] == [1, 2]
    assert {str(bad) for bad in parts.bad_rows} == {
        f"rows.jsonl row {row}: no turn of a user" for row in refused
    }
    refused |= {row.row for row in division.train[0][:9]}
    with pytest.raises(DataError) as caught:
        assemble(built, division)
    assert "of 80 rows of the data are malformed" in str(caught.value)
    assert f"rows.jsonl row {division.train[0][0].row}: no turn of a user" in str(caught.value)


def test_labelled_texts_are_cut_at_their_end(encoder):
    found = cut_of(tokenize([Labelled(1, "where is the key " * 20, "a")], encoder, 16, ("a",)))
    assert found.cut_rows == found.prompt_rows == 1 and found.completion_rows == 0


def test_control_tokens_that_are_read_as_text_are_counted_and_told(experiment, rows_file):
    rows = [
        {"prompt": f"Q {i}:", "completion": f" x{'</s> y' if i % 2 else ''} {i}"} for i in range(80)
    ]
    built = experiment(
        data={"source": rows_file(rows), "kind": "instruction"},
        objective={"name": "sft"},
        federation={"clients": 2},
    )
    division = partition_data(built)
    odd = sum(
        row.row % 2 == 0 for own in division.train.values() for row in own
    )  # rows count from 1
    accounts = assemble(built, division).accounts
    assert accounts.source.cut.escaped_rows == odd > 0
    assert accounts.warnings == (
        "control tokens of the tokenizer, such as its end token, stand in the text of "
        f"{odd} of {accounts.source.trained} training rows and are encoded as text; if these rows were "
        'rendered with the chat template beforehand: data.control_tokens = "control"',
    )
    rendered = replace(built, data=built.data.model_copy(update={"control_tokens": "control"}))
    assert not assemble(rendered, partition_data(rendered)).accounts.warnings


CHATML = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{{ m['role'] + ': ' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@pytest.fixture
def no_system(model_folder, tmp_path):
    """The small model with a template that refuses a system's turn."""
    import shutil

    folder = tmp_path / "no-system"
    shutil.copytree(model_folder, folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": CHATML}))
    (folder / "chat_template.jinja").write_text(CHATML)
    return str(folder)


def said(number, *, system=False):
    first = [{"role": "system", "content": "Be nice"}] if system else []
    turns = [*first, {"role": "user", "content": f"Q {number}"}]
    return {"messages": [*turns, {"role": "assistant", "content": f"A {number}"}]}


def test_a_test_set_that_cannot_be_read_stops_the_run_before_it_begins(
    experiment, rows_file, no_system
):
    """Its share of malformed rows is its own, not that of all rows."""
    built = experiment(
        data={
            "source": rows_file([said(i) for i in range(400)]), "kind": "instruction",
            "test_source": rows_file([said(i, system=True) for i in range(400, 410)], "test.jsonl"),
        },
        model={"path": no_system},
        objective={"name": "sft"},
        federation={"clients": 2},
    )  # fmt: skip
    with pytest.raises(DataError) as told:
        assemble(built, partition_data(built))
    assert "10 of 10 rows of the test set are malformed (100.0%)" in str(told.value)
    assert "the test set row 1: the chat template refuses it: no system" in str(told.value)
    lenient = replace(built, data=built.data.model_copy(update={"max_bad_share": 1.0}))
    with pytest.raises(
        DataError, match="no row of the global held-out set is left after tokenising"
    ):
        assemble(lenient, partition_data(lenient))


def test_samples_are_rows_that_the_template_takes(experiment, rows_file, no_system):
    import fedloom

    tests = [said(i, system=i < 403) for i in range(400, 410)]
    built = experiment(
        data={
            "source": rows_file([said(i) for i in range(40)]), "kind": "instruction",
            "test_source": rows_file(tests, "test.jsonl"), "max_bad_share": 0.5,
        },
        model={"path": no_system},
        objective={"name": "sft"},
        federation={"clients": 2, "rounds": 1},
        evaluation={"samples": 3, "max_new_tokens": 2},
    )  # fmt: skip
    record = json.loads((fedloom.run(built).folder / "samples.json").read_text())
    assert [own["wanted"] for own in record] == ["A 403", "A 404", "A 405"]


def test_a_refused_pair_is_one_malformed_row(experiment, rows_file, no_system):
    def pair(number):
        return {
            "prompt": said(number, system=number < 3)["messages"][:-1],
            "chosen": [{"role": "assistant", "content": "yes"}],
            "rejected": [{"role": "assistant", "content": "no"}],
        }

    built = experiment(
        data={
            "source": rows_file([pair(i) for i in range(100)]), "kind": "preference",
            "test_source": rows_file([pair(i) for i in range(200, 210)], "test.jsonl"),
        },
        model={"path": no_system},
        objective={"name": "kto"},
        federation={"clients": 2},
        partition={"client_test_fraction": 0.0},
    )  # fmt: skip
    parts = assemble(built, partition_data(built))
    assert [bad.number for bad in parts.bad_rows] == [1, 2, 3]


def test_malformed_rows_of_the_public_source_are_in_the_record_of_the_run(experiment, rows_file):
    def texts(name, first=None):
        rows = [{"text": f"{name} {i}", "label": ("loss", "theft")[i % 2]} for i in range(30)]
        rows[0]["text"] = first or rows[0]["text"]
        return rows_file(rows, f"{name}.jsonl")

    data = {"source": texts("train"), "test_source": texts("test"), "kind": "labelled"}
    built = experiment(
        data=data,
        public={"source": texts("public", 7), "rows": 6},
        method={"name": "distillation"},
        objective={"name": "classification"},
    )
    parts = assemble(built, partition_data(built))
    record = run_record(Path("x"), built, parts, MadeWith(), "id", SIMULATION)
    assert record["data"]["malformed"] == 1 == parts.accounts.public.malformed
